"""The machine's measured peaks."""

import time
from pathlib import Path

import pytest
import torch

from sfumato import machine


def test_peak_is_what_a_product_takes():
    """A product timed by hand is no faster than the peak (but for noise), and the peak is no fantasy."""
    peak = machine.measure_peak("fp32", "cpu", 0.1)
    x = torch.randn(512, 512)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    assert 1e8 < peak < 1e14
    assert peak > 0.1 * 2 * 512**3 / min(times)


def test_convolution_and_bandwidth_are_plausible():
    assert 1e8 < machine.measure_convolution_peak("fp32", "cpu", 0.05) < 1e14
    assert 1e8 < machine.measure_bandwidth("cpu", 0.05) < 1e13


@pytest.mark.parametrize(
    ("flags", "gain", "precision"),
    [([], 2.0, "fp32"), (["avx512_bf16"], 2.0, "bf16"), (["avx512_bf16"], 1.05, "fp32"), (["amx_bf16"], 0.5, "fp32")],
)
def test_bf16_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, flags: list[str], gain: float, precision: str):
    rate = lambda kind, device: gain if kind == "bf16" else 1.0
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    monkeypatch.setattr(machine, "has_bf16", machine.has_bf16.__wrapped__)
    monkeypatch.setattr(machine, "measure_peak", rate)
    monkeypatch.setattr(machine, "measure_convolution_peak", rate)
    assert machine.best_precision.__wrapped__("cpu") == precision


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("150000 100000", 1.5), ("9 1", 4), (None, 4)])
def test_a_quota_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, cores: float):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.cores_allowed() == cores


def test_a_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    """`fit` asks for the precision, then for the peak in it; the second answer is there already."""
    calls: list[object] = []
    monkeypatch.setattr(machine, "cpu_flags", lambda: ["avx512_bf16"])
    monkeypatch.setattr(machine, "_fastest", lambda *given: calls.append(given) or 1.0)
    for measured in (machine.best_precision, machine.measure_peak, machine.measure_convolution_peak):
        measured.cache_clear()
    try:
        machine.best_precision("cpu")
        before = len(calls)
        machine.measure_peak("fp32", "cpu")
        machine.measure_peak("bf16", "cpu")
        assert before == len(calls) > 0
    finally:
        for measured in (machine.best_precision, machine.measure_peak, machine.measure_convolution_peak):
            measured.cache_clear()


@pytest.mark.parametrize(("flags", "has"), [(["avx512_bf16"], True), (["avx2"], False)])
def test_bf16_at_all(monkeypatch: pytest.MonkeyPatch, flags: list[str], has: bool):
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    assert machine.has_bf16.__wrapped__("cpu") is has
    assert machine.has_bf16.__wrapped__("mps") is False


def test_what_is_known_of_the_machine():
    assert 0 < machine.free_memory_bytes() <= machine.memory_bytes()
    assert machine.cores_allowed() > 0
    assert machine.memory_bytes() > 2**28
    assert set(machine.cpu_flags()) <= set(machine.CPU_FLAGS)
    assert torch.device(machine.default_device())
