"""The doctor's advice and measurements."""

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato import hardware
from sfumato.apps.cli import show
from sfumato.apps.doctor import advice, doctor


def make_report(**changes: Any) -> dict[str, Any]:
    report: dict[str, Any] = {
        "cpu": {"threads": 2, "cores_allowed": 2.0, "load": 0.1, "memory_free_gb": 8.0},
        "device": {"name": "cpu", "gpu_present": False},
        "speed": {
            "precision": "bf16",
            **{"matrix_fp32_gflops": 100.0, "matrix_bf16_gflops": 300.0},
            **{"convolution_fp32_gflops": 50.0, "convolution_bf16_gflops": 125.0},
        },
        "disk": {"free_gb": 100.0, "cache": "/cache", "cache_gb": 1.0},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        report[section][key] = value
    return report


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cpu__threads": 1}, "OMP_NUM_THREADS"),
        ({"cpu__threads": 8}, "8 threads on 2 cores"),
        ({"cpu__cores_allowed": 1.5}, "2 threads on 1.5 cores"),
        ({"cpu__load": 3.0}, "busy"),
        ({"cpu__memory_free_gb": 0.5}, "0.5 GB of memory"),
        ({"device__gpu_present": True}, "there is a GPU"),
        ({"speed__matrix_bf16_gflops": 30.0}, "30 GFLOP/s"),
        ({"disk__free_gb": 1.0}, "disk"),
        ({"disk__cache_gb": 30.0}, "30.0 GB are cached in /cache"),
    ],
)
def test_advice(changes: dict[str, Any], expected: str):
    first, line = advice(make_report(**changes))
    assert expected in line and "runs use bf16" in first


def test_the_precision_is_always_explained():
    (line,) = advice(make_report())
    speedups = "matrix products 3.0 and convolutions 2.5 times as fast as fp32"
    assert line == f"runs use bf16 on this CPU: bf16 makes {speedups}"


def test_one_thread_on_a_single_core_needs_no_advice():
    assert len(advice(make_report(cpu__threads=1, cpu__cores_allowed=0.5))) == 1


def test_unknown_memory_needs_no_advice():
    assert len(advice(make_report(cpu__memory_free_gb=0.0))) == 1


def test_doctor_reports_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / "entry").write_bytes(bytes(3000))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "measure_peak", lambda precision, device: {"fp32": 1e11, "bf16": 3e11}[precision])
    monkeypatch.setattr(hardware, "measure_convolution_peak", lambda precision, device: 5e10)
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda device: 2e10)
    monkeypatch.setattr(hardware, "best_precision", lambda device: "bf16")
    report = doctor()
    assert report["speed"]["matrix_bf16_gflops"] == pytest.approx(300)
    assert report["speed"]["memory_gb_s"] == pytest.approx(20)
    assert report["versions"]["torch"] != "not installed"
    assert report["speed"]["convolution_fp32_gflops"] == pytest.approx(50)
    assert report["cpu"]["threads"] >= 1 and 0 < report["cpu"]["memory_free_gb"] <= report["cpu"]["memory_gb"]
    assert report["disk"]["free_gb"] > 0 and report["advice"]
    assert (report["disk"]["cache"], report["disk"]["cache_gb"]) == (str(tmp_path), pytest.approx(3e-6))


def test_lines_and_json_are_complete(capsys: pytest.CaptureFixture[str]):
    report = make_report() | {"advice": ["take care", "and time"]}
    show(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == report
    show(report, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert ["speed.matrix_bf16_gflops", "300"] in [line.split() for line in lines] and lines[-1].strip() == "and time"
