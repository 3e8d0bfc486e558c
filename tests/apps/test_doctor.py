"""The doctor's advice, and that what it measures is plausible."""

from typing import Any

import pytest

from sfumato import machine
from sfumato.apps.doctor import advice, doctor


def report(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "cpu": {"threads": 2, "cores_allowed": 2, "load": 0.1},
        "device": {"name": "cpu", "gpu_present": False},
        "speed": {"precision": "bf16"},
        "disk": {"free_gb": 100.0},
    }
    for place, value in changes.items():
        section, _, key = place.partition("__")
        whole[section][key] = value
    return whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpu__threads": 1}, "OMP_NUM_THREADS"),
        ({"cpu__load": 3.0}, "busy"),
        ({"device__gpu_present": True}, "GPU"),
        ({"speed__precision": "fp32"}, "bf16"),
        ({"disk__free_gb": 1.0}, "disk"),
    ],
)
def test_advice(changes: dict[str, Any], said: str):
    lines = advice(report(**changes))
    assert len(lines) == 1
    assert said in lines[0]


def test_no_advice_where_all_is_well():
    assert advice(report()) == []


def test_doctor_reports_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "measure_peak", lambda precision, device: {"fp32": 1e11, "bf16": 3e11}[precision])
    monkeypatch.setattr(machine, "measure_convolution_peak", lambda precision, device: 5e10)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 2e10)
    monkeypatch.setattr(machine, "best_precision", lambda device: "bf16")
    told = doctor()
    assert told["speed"]["matrix_bf16_gflops"] == pytest.approx(300)
    assert told["speed"]["memory_gb_s"] == pytest.approx(20)
    assert told["versions"]["torch"] != "not installed"
    assert told["cpu"]["threads"] >= 1
