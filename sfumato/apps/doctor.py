"""What this machine can do, and what would make it do more."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sfumato import __version__

VERSIONS = ("torch", "numpy", "accelerate", "safetensors", "diffusers")
FREE_DISK = 5e9  # bytes: a run with its checkpoint and a latent cache fits well


def doctor() -> dict[str, Any]:
    """Measure this machine: arithmetic, memory, disk, versions, and advice. Takes a few seconds."""
    device, processor, speed = _device(), _processor(), _speed()
    disk = {"free_gb": shutil.disk_usage(os.getcwd()).free / 1e9}
    report = {"versions": _versions(), "cpu": processor, "device": device, "speed": speed, "disk": disk}
    return report | {"advice": advice(report)}


def advice(report: dict[str, Any]) -> list[str]:
    """What to change, one line each; empty where all is well."""
    cpu, device, speed = report["cpu"], report["device"], report["speed"]
    lines: list[str] = []
    if device["name"] == "cpu" and device["gpu_present"]:
        lines.append("a GPU is there, but this torch was built without it: install torch from pytorch.org for it")
    if cpu["threads"] < cpu["cores_allowed"]:
        lines.append(f"torch uses {cpu['threads']} of {cpu['cores_allowed']} cores: unset OMP_NUM_THREADS")
    if device["name"] == "cpu" and speed["precision"] == "fp32":
        lines.append("this CPU gains nothing from bf16: runs use fp32")
    if cpu["load"] > 0.5 * cpu["cores_allowed"]:
        lines.append(f"other programs keep the machine busy (load {cpu['load']:.1f}): budgets will buy less")
    if report["disk"]["free_gb"] * 1e9 < FREE_DISK:
        lines.append("little disk is free here: large runs may not fit")
    return lines


def _versions() -> dict[str, str]:
    known = {"sfumato": __version__, "python": platform.python_version()}
    return known | {name: _version(name) for name in VERSIONS}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, Any]:
    import torch

    from sfumato.machine import cpu_flags, cpu_name, memory_bytes

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {
        "name": cpu_name(),
        "flags": cpu_flags(),
        "cores_allowed": allowed,
        "threads": torch.get_num_threads(),
        "load": load,
        "memory_gb": memory_bytes() / 1e9,
    }


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
