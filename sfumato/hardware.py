"""Hardware capabilities, measured: peak rates of matrix products and convolutions, memory bandwidth, bf16 support.

The plan chooses the precision by these numbers, and `sfumato doctor` prints them. The training log divides a step's
floating-point operations by `measure_peak` to report hardware utilisation.
"""

import os
import platform
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MIN_BF16_SPEEDUP = 1.15  # speed of bf16 relative to fp32 below which its rounding errors do not pay
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "bf16")
# (rows, in, out) of products as in training; the first is short enough that a busy machine rarely interrupts it
MATRIX_SIZES = ((512, 512, 512), (2048, 256, 1024), (1024, 1024, 1024))
GPU_MATRIX_SIZES = ((8192, 8192, 8192),)
PEAK_SECONDS = 0.15  # approximate duration of one peak measurement; `fit` takes four of them


def default_device() -> str:
    """The best available device: an accelerator with float64 support, which tables need, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def cpu_flags() -> list[str]:
    """The CPU's instruction sets among `CPU_FLAGS` (empty if the system does not report them)."""
    source = Path("/proc/cpuinfo")
    reported = set(source.read_text().split()) if source.exists() else set[str]()
    return [flag for flag in CPU_FLAGS if flag in reported]


def cpu_name() -> str:
    """The CPU's model name."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def memory_bytes() -> int:
    """Main memory in bytes (0 if the system does not report it)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def free_memory_bytes() -> int:
    """Available main memory in bytes (0 if the system does not report it)."""
    source = Path("/proc/meminfo")
    match = re.search(r"^MemAvailable: *(\d+) kB", source.read_text(), re.MULTILINE) if source.exists() else None
    return 1024 * int(match[1]) if match else 0


def cores_allowed() -> float:
    """Number of cores this process may use: its CPU affinity, limited by the container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = Path("/sys/fs/cgroup/cpu.max")
    quota, period = source.read_text().split() if source.exists() else ("max", "1")
    return float(bound) if quota == "max" else min(float(bound), int(quota) / int(period))


@cache
def measure_peak(precision: str = "fp32", device: str = "cpu", seconds: float = PEAK_SECONDS) -> float:
    """Peak floating-point operations per second of matrix products, the reference for hardware utilisation.

    Args:
        precision: `fp32` or `bf16`.
        device: Where to measure.
        seconds: Approximate duration of the measurement.
    """
    import torch

    sizes = MATRIX_SIZES if device == "cpu" else GPU_MATRIX_SIZES
    dtype = getattr(torch, DTYPES[precision])
    return max(_matrix_rate(*size, dtype, device, seconds / len(sizes)) for size in sizes)


@cache
def measure_convolution_peak(precision: str = "fp32", device: str = "cpu", seconds: float = PEAK_SECONDS) -> float:
    """Floating-point operations per second of a 3x3 channels-last convolution of the size that codecs use."""
    import torch

    dtype = getattr(torch, DTYPES[precision])
    batch, channels, side = (8, 64, 32) if device == "cpu" else (128, 256, 64)
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, weight = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
    flops = 2 * batch * side**2 * channels**2 * 9
    return flops / _fastest(lambda: torch.conv2d(x, weight, padding=1), device, seconds)


@cache
def measure_bandwidth(device: str = "cpu", seconds: float = PEAK_SECONDS, size: int | None = None) -> float:
    """Memory bandwidth of a copy in bytes per second, reads and writes both counted.

    Args:
        device: Where to measure.
        seconds: Approximate duration of the measurement.
        size: Bytes to copy; by default far more than any cache holds.
    """
    import torch

    source = torch.zeros((size or (2**27 if device == "cpu" else 2**31)) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, seconds)


@cache
def has_bf16(device: str = "cpu") -> bool:
    """Whether a device supports bfloat16 natively, without emulation."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_flags()))


@cache
def best_precision(device: str = "cpu") -> str:
    """`bf16` if it is faster for both matrix products and convolutions, else `fp32`."""
    if device != "cpu" or not has_bf16(device):
        return "bf16" if has_bf16(device) else "fp32"
    speedups = [peak("bf16", device) / peak("fp32", device) for peak in (measure_peak, measure_convolution_peak)]
    return "bf16" if min(speedups) > MIN_BF16_SPEEDUP else "fp32"


def _matrix_rate(rows: int, inner: int, columns: int, dtype: "torch.dtype", device: str, seconds: float) -> float:
    import torch

    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    return 2 * rows * inner * columns / _fastest(lambda: torch.nn.functional.linear(x, weight), device, seconds)


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest of several calls, the one least disturbed by other processes."""
    import torch

    synchronize = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    with torch.inference_mode():
        while calls < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            synchronize()
            best, calls = min(best, time.perf_counter() - start), calls + 1
    return best
