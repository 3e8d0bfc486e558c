"""What this machine can do, and what would make it do more."""

import os
import platform
import shutil
from typing import Any

from sfumato import __version__

VERSIONS = ("torch", "numpy", "accelerate", "safetensors", "diffusers")
FREE_DISK = 5e9  # bytes: a run with its checkpoint and a latent cache fits well
LARGE_CACHE = 20e9  # bytes: what is kept between runs
FREE_MEMORY = 2e9  # bytes: torch, a data set of some hundred MB and a run's tensors fit well
SLOW = 100.0  # GFLOP/s: a fraction of what two cores of a server have


def doctor() -> dict[str, Any]:
    """Measure this machine: arithmetic, memory, disk, versions, and advice. Takes a few seconds."""
    device, processor, speed = _device(), _processor(), _speed()
    report = {"versions": _versions(), "cpu": processor, "device": device, "speed": speed, "disk": _disk()}
    return report | {"advice": advice(report)}


def advice(report: dict[str, Any]) -> list[str]:
    """What the numbers mean for training here, and what to change: a sentence each."""
    return [*_on_speed(report["device"], report["speed"]), *_on_room(report["cpu"], report["disk"])]


def _on_speed(device: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """Which precision runs use, and why; whether they will be slow."""
    best, name = speed["precision"], "this CPU" if device["name"] == "cpu" else device.get("gpu", device["name"])
    gains = [speed[f"{kind}_bf16_gflops"] / speed[f"{kind}_fp32_gflops"] for kind in ("matrix", "convolution")]
    compared = "bf16 makes matrix products {:.1f} and convolutions {:.1f} times as fast as fp32".format(*gains)
    lines = [f"runs use {best} on {name}: {compared}"]
    if device["name"] == "cpu" and device["gpu_present"]:
        lines.append("a GPU is there, but this torch was built without it: install torch from pytorch.org for it")
    peak = speed[f"matrix_{best}_gflops"]
    if peak < SLOW:
        lines.append(f"{peak:.0f} GFLOP/s are few: take smaller images or a larger --budget than the usual 10m")
    return lines


def _on_room(cpu: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    """What keeps runs from having all of the machine."""
    threads, cores, lines = cpu["threads"], cpu["cores_allowed"], list[str]()
    if threads < int(cores):
        lines.append(f"torch uses {threads} of {cores:g} cores: unset OMP_NUM_THREADS, or set it to {int(cores)}")
    if threads > max(1, cores):
        lines.append(f"torch uses {threads} threads on {cores:g} cores, which wait for each other: set OMP_NUM_THREADS")
    if cpu["load"] > 0.5 * cores:
        lines.append(f"other programs keep the machine busy (load {cpu['load']:.1f}): budgets will buy less")
    if 0 < cpu["memory_free_gb"] * 1e9 < FREE_MEMORY:
        lines.append(f"{cpu['memory_free_gb']:.1f} GB of memory are free: close other programs before training")
    if disk["free_gb"] * 1e9 < FREE_DISK:
        lines.append(f"{disk['free_gb']:.1f} GB of disk are free here: large runs may not fit")
    if disk["cache_gb"] * 1e9 > LARGE_CACHE:
        lines.append(f"{disk['cache_gb']:.1f} GB are cached in {disk['cache']}: delete it when you like")
    return lines


def _versions() -> dict[str, str]:
    known = {"sfumato": __version__, "python": platform.python_version()}
    return known | {name: _version(name) for name in VERSIONS}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, Any]:
    import torch

    from sfumato.machine import cores_allowed, cpu_flags, cpu_name, free_memory_bytes, memory_bytes

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
    """Room where the command was called, and what the cache takes."""
    from sfumato.data import cache_root

    cached = sum(_size(os.path.join(folder, name)) for folder, _, names in os.walk(cache_root()) for name in names)
    free = shutil.disk_usage(os.getcwd()).free
    return {"free_gb": free / 1e9, "cache": str(cache_root()), "cache_gb": cached / 1e9}


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:  # a run beside this one took it away
        return 0


def _device() -> dict[str, Any]:
    import torch

    from sfumato.machine import default_device

    name = default_device()
    device: dict[str, Any] = {"name": name, "gpu_present": shutil.which("nvidia-smi") is not None}
    if name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device |= {"gpu": properties.name, "gpu_memory_gb": properties.total_memory / 1e9}
        device["gpus"] = torch.cuda.device_count()
    return device


def _speed() -> dict[str, Any]:
    """Measured in GFLOP/s and GB/s."""
    from sfumato import machine

    device = machine.default_device()
    speed: dict[str, Any] = {"precision": machine.best_precision(device)}
    for precision in machine.DTYPES:
        speed[f"matrix_{precision}_gflops"] = machine.measure_peak(precision, device) / 1e9
        speed[f"convolution_{precision}_gflops"] = machine.measure_convolution_peak(precision, device) / 1e9
    return speed | {"memory_gb_s": machine.measure_bandwidth(device) / 1e9}
