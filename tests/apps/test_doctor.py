"""The doctor's advice, and that what it measures is plausible."""

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato import machine
from sfumato.apps.cli import show
from sfumato.apps.doctor import advice, doctor


def report(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "cpu": {"threads": 2, "cores_allowed": 2.0, "load": 0.1, "memory_free_gb": 8.0},
        "device": {"name": "cpu", "gpu_present": False},
        "speed": {
            "precision": "bf16",
            **{"matrix_fp32_gflops": 100.0, "matrix_bf16_gflops": 300.0},
            **{"convolution_fp32_gflops": 50.0, "convolution_bf16_gflops": 125.0},
        },
        "disk": {"free_gb": 100.0, "cache": "/kept/here", "cache_gb": 1.0},
    }
    for place, value in changes.items():
        section, _, key = place.partition("__")
        whole[section][key] = value
    return whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpu__threads": 1}, "OMP_NUM_THREADS"),
        ({"cpu__threads": 8}, "8 threads on 2 cores"),
        ({"cpu__cores_allowed": 1.5}, "2 threads on 1.5 cores"),
        ({"cpu__load": 3.0}, "busy"),
        ({"cpu__memory_free_gb": 0.5}, "0.5 GB of memory"),
        ({"device__gpu_present": True}, "a GPU is there"),
        ({"speed__matrix_bf16_gflops": 30.0}, "30 GFLOP/s"),
        ({"disk__free_gb": 1.0}, "disk"),
        ({"disk__cache_gb": 30.0}, "30.0 GB are cached in /kept/here"),
    ],
)
def test_advice(changes: dict[str, Any], said: str):
    first, line = advice(report(**changes))
    assert said in line and "runs use bf16" in first


def test_where_all_is_well_the_precision_is_explained():
    (line,) = advice(report())
    gains = "matrix products 3.0 and convolutions 2.5 times as fast as fp32"
    assert line == f"runs use bf16 on this CPU: bf16 makes {gains}"


def test_one_thread_of_a_single_core_is_right():
    assert len(advice(report(cpu__threads=1, cpu__cores_allowed=0.5))) == 1


def test_memory_that_is_not_known_is_not_little():
    assert len(advice(report(cpu__memory_free_gb=0.0))) == 1


def test_doctor_reports_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / "kept").write_bytes(bytes(3000))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "measure_peak", lambda precision, device: {"fp32": 1e11, "bf16": 3e11}[precision])
    monkeypatch.setattr(machine, "measure_convolution_peak", lambda precision, device: 5e10)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 2e10)
    monkeypatch.setattr(machine, "best_precision", lambda device: "bf16")
    told = doctor()
    assert told["speed"]["matrix_bf16_gflops"] == pytest.approx(300)
    assert told["speed"]["memory_gb_s"] == pytest.approx(20)
    assert told["versions"]["torch"] != "not installed"
    assert told["speed"]["convolution_fp32_gflops"] == pytest.approx(50)
    assert told["cpu"]["threads"] >= 1 and 0 < told["cpu"]["memory_free_gb"] <= told["cpu"]["memory_gb"]
    assert told["disk"]["free_gb"] > 0 and told["advice"]
    assert (told["disk"]["cache"], told["disk"]["cache_gb"]) == (str(tmp_path), pytest.approx(3e-6))


def test_a_person_and_a_program_are_told_all(capsys: pytest.CaptureFixture[str]):
    known = report() | {"advice": ["take care", "and time"]}
    show(known, as_json=True)
    assert json.loads(capsys.readouterr().out) == known
    show(known, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert ["speed.matrix_bf16_gflops", "300"] in [line.split() for line in lines] and lines[-1].strip() == "and time"
