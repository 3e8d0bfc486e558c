"""Measured peaks, precision and limits of the hardware."""

import time
from pathlib import Path

import pytest
import torch

from sfumato import hardware


def test_the_peak_is_the_rate_of_a_matrix_product():
    """A product timed by hand is not faster than the peak (but for noise), and not slower by orders of magnitude."""
    peak = hardware.measure_peak("fp32", "cpu", 0.1)
    x = torch.randn(512, 512)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    assert 1e8 < peak < 1e14
    assert peak > 0.1 * 2 * 512**3 / min(times)


def test_convolution_and_bandwidth_are_plausible():
    assert 1e8 < hardware.measure_convolution_peak("fp32", "cpu", 0.05) < 1e14
    assert 1e8 < hardware.measure_bandwidth("cpu", 0.05) < 1e13


@pytest.mark.parametrize(
    ("flags", "speedup", "precision"),
    [([], 2.0, "fp32"), (["avx512_bf16"], 2.0, "bf16"), (["avx512_bf16"], 1.05, "fp32"), (["amx_bf16"], 0.5, "fp32")],
)
def test_bf16_is_chosen_only_if_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], speedup: float, precision: str
):
    rate = lambda precision, device: speedup if precision == "bf16" else 1.0
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    monkeypatch.setattr(hardware, "has_bf16", hardware.has_bf16.__wrapped__)
    monkeypatch.setattr(hardware, "measure_peak", rate)
    monkeypatch.setattr(hardware, "measure_convolution_peak", rate)
    assert hardware.best_precision.__wrapped__("cpu") == precision


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("150000 100000", 1.5), ("9 1", 4), (None, 4)])
def test_the_quota_of_a_container_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, cores: float
):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert hardware.cores_allowed() == cores


CACHED = (hardware.has_bf16, hardware.best_precision, hardware.measure_peak, hardware.measure_convolution_peak)


def test_a_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    """`fit` asks for the precision, then for the peak in it; the second answer is cached."""
    calls: list[object] = []
    monkeypatch.setattr(hardware, "cpu_flags", lambda: ["avx512_bf16"])
    monkeypatch.setattr(hardware, "_fastest", lambda *args: calls.append(args) or 1.0)
    for measured in CACHED:
        measured.cache_clear()
    try:
        hardware.best_precision("cpu")
        before = len(calls)
        hardware.measure_peak("fp32", "cpu")
        hardware.measure_peak("bf16", "cpu")
        assert before == len(calls) > 0
    finally:
        for measured in CACHED:
            measured.cache_clear()


@pytest.mark.parametrize(("flags", "supported"), [(["avx512_bf16"], True), (["avx2"], False)])
def test_bf16_support(monkeypatch: pytest.MonkeyPatch, flags: list[str], supported: bool):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    assert hardware.has_bf16.__wrapped__("cpu") is supported
    assert hardware.has_bf16.__wrapped__("mps") is False


def test_reported_limits_are_plausible():
    assert 0 < hardware.free_memory_bytes() <= hardware.memory_bytes()
    assert hardware.cores_allowed() > 0
    assert hardware.memory_bytes() > 2**28
    assert set(hardware.cpu_flags()) <= set(hardware.CPU_FLAGS)
    assert torch.device(hardware.default_device())
