"""Measure this machine, and advise how to train faster on it."""

import os
import platform
import shutil
from typing import Any

from sfumato import __version__

PACKAGES = ("torch", "numpy", "accelerate", "safetensors", "diffusers")
MIN_FREE_DISK = 5e9  # bytes, enough for a run with its checkpoint and a latent cache
MAX_CACHE = 20e9  # bytes of cached data, beyond which the advice mentions the cache
MIN_FREE_MEMORY = 2e9  # bytes, enough for torch, a data set of a few hundred MB and a run's tensors
MIN_GFLOPS = 100.0  # GFLOP/s, a fraction of what two server cores reach


def doctor() -> dict[str, Any]:
    """Measure this machine (compute, memory, disk, versions) and give advice; takes a few seconds."""
    device, cpu, speed = _device(), _cpu(), _speed()
    report = {"versions": _versions(), "cpu": cpu, "device": device, "speed": speed, "disk": _disk()}
    return report | {"advice": advice(report)}


def advice(report: dict[str, Any]) -> list[str]:
    """What the measurements mean for training, and what to change: a sentence each."""
    return [*_speed_advice(report["device"], report["speed"]), *_resource_advice(report["cpu"], report["disk"])]


def _speed_advice(device: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """The precision of runs and its reason, and warnings about a slow machine."""
    best, name = speed["precision"], "this CPU" if device["name"] == "cpu" else device.get("gpu", device["name"])
    speedups = [speed[f"{op}_bf16_gflops"] / speed[f"{op}_fp32_gflops"] for op in ("matrix", "convolution")]
    comparison = "bf16 makes matrix products {:.1f} and convolutions {:.1f} times as fast as fp32".format(*speedups)
    lines = [f"runs use {best} on {name}: {comparison}"]
    if device["name"] == "cpu" and device["gpu_present"]:
        lines.append("there is a GPU, but this torch was built without GPU support: install torch from pytorch.org")
    peak = speed[f"matrix_{best}_gflops"]
    if peak < MIN_GFLOPS:
        lines.append(f"{peak:.0f} GFLOP/s is slow: use smaller images, or a larger --budget than the default 10m")
    return lines


def _resource_advice(cpu: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    """Warnings about cores, memory and disk that runs cannot use."""
    threads, cores, lines = cpu["threads"], cpu["cores_allowed"], list[str]()
    if threads < int(cores):
        lines.append(f"torch uses {threads} of {cores:g} cores: unset OMP_NUM_THREADS, or set it to {int(cores)}")
    if threads > max(1, cores):
        lines.append(f"torch uses {threads} threads on {cores:g} cores, which slows it down: set OMP_NUM_THREADS")
    if cpu["load"] > 0.5 * cores:
        lines.append(f"other programs keep the machine busy (load {cpu['load']:.1f}): runs will train less")
    if 0 < cpu["memory_free_gb"] * 1e9 < MIN_FREE_MEMORY:
        lines.append(f"{cpu['memory_free_gb']:.1f} GB of memory is free: close other programs before training")
    if disk["free_gb"] * 1e9 < MIN_FREE_DISK:
        lines.append(f"{disk['free_gb']:.1f} GB of disk is free here: large runs may not fit")
    if disk["cache_gb"] * 1e9 > MAX_CACHE:
        lines.append(f"{disk['cache_gb']:.1f} GB are cached in {disk['cache']}: it is safe to delete")
    return lines


def _versions() -> dict[str, str]:
    own = {"sfumato": __version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, Any]:
    import torch

    from sfumato.hardware import cores_allowed, cpu_flags, cpu_name, free_memory_bytes, memory_bytes

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {
        "name": cpu_name(),
        "flags": cpu_flags(),
        "cores_allowed": cores_allowed(),
        "threads": torch.get_num_threads(),
        "load": load,
        "memory_gb": memory_bytes() / 1e9,
        "memory_free_gb": free_memory_bytes() / 1e9,
    }


def _disk() -> dict[str, Any]:
    """Free disk space in the working directory, and the size of the cache."""
    from sfumato.data import cache_root

    cached = sum(_size(os.path.join(folder, name)) for folder, _, names in os.walk(cache_root()) for name in names)
    free = shutil.disk_usage(os.getcwd()).free
    return {"free_gb": free / 1e9, "cache": str(cache_root()), "cache_gb": cached / 1e9}


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:  # deleted by another process
        return 0


def _device() -> dict[str, Any]:
    import torch

    from sfumato.hardware import default_device

    name = default_device()
    device: dict[str, Any] = {"name": name, "gpu_present": shutil.which("nvidia-smi") is not None}
    if name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device |= {"gpu": properties.name, "gpu_memory_gb": properties.total_memory / 1e9}
        device["gpus"] = torch.cuda.device_count()
    return device


def _speed() -> dict[str, Any]:
    """Measured speed in GFLOP/s and GB/s."""
    from sfumato import hardware

    device = hardware.default_device()
    speed: dict[str, Any] = {"precision": hardware.best_precision(device)}
    for precision in hardware.DTYPES:
        speed[f"matrix_{precision}_gflops"] = hardware.measure_peak(precision, device) / 1e9
        speed[f"convolution_{precision}_gflops"] = hardware.measure_convolution_peak(precision, device) / 1e9
    return speed | {"memory_gb_s": hardware.measure_bandwidth(device) / 1e9}
