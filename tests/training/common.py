"""Small images, a `fit` of a second, and readers of a run folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.model import Model
from sfumato.storage import CONFIGURED_PARTS as PARTS
from sfumato.training import fit
from sfumato.training.trainer import Trainer

SMALL = (  # everything that the plan would derive from the machine, and small sizes
    "train.precision=fp32",
    "codec.width=16",
    "codec.feature_steps=2",
    "denoiser.width=32",
    "denoiser.depth=1",
    "train.codec.batch=8",
    "train.codec.steps=10",
    "train.codec.warmup=2",
    "train.denoiser.batch=16",
    "train.denoiser.warmup=2",
    "sample.guidance=1.5",
    "sample.steps=2",
)
PLAIN = ("codec.perceptual=none", "codec.bottleneck=none")  # the fastest first stage


def pictures(count: int, shape: tuple[int, int, int], classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bars, columns and boxes with a little noise: (N, H, W, C) bytes and their class (N,)."""
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    label = np.arange(count) % classes
    x = rng.integers(0, 30, (count, height, width, channels))
    for image, shape_class in zip(x, label, strict=True):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        rows = slice(None) if shape_class == 1 else slice(top, top + height // 2)
        columns = slice(None) if shape_class == 0 else slice(left, left + width // 2)
        image[rows, columns] += rng.integers(120, 220, channels)
    return x.astype(np.uint8), label


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """The same images as data: (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures(count, shape, seed=seed)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1


def small_fit(source: Path, out: Path, *overrides: str, steps: int = 20, **options: Any) -> Model:
    """Ten steps of each stage on the CPU."""
    return fit(str(source), out=out, steps=steps, overrides=[*SMALL, *overrides], device="cpu", **options)


def weights(run: Path) -> dict[str, Tensor]:
    """Every tensor of the finished model, by part and name."""
    names = [part for part in (*PARTS, "guide") if (run / part).is_dir()]
    parts = {part: load_file(run / part / "model.safetensors") for part in names}
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def record(run: Path) -> dict[str, Any]:
    """The contents of `run.json`."""
    return json.loads((run / "run.json").read_text())


def checkpoint(run: Path) -> dict[str, Any]:
    """The metadata of the checkpoint."""
    return json.loads((run / "checkpoint" / "state.json").read_text())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; unlike in `torch.equal`, NaN equals NaN."""
    bits = [x.contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_same_run(run: Path, other: Path) -> None:
    """The two runs ended with the same weights, bit for bit, and recorded each step once."""
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bits(first[name], second[name])] == []
    steps = [(row["stage"], row["step"]) for row in rows(run)]
    assert len(steps) == len(set(steps)), steps
    assert record(run)["plan"] == record(other)["plan"]
    assert record(run)["done"] == ["codec", "denoiser"]


def reported_every_step(run: Any = Trainer.run) -> Any:
    """`Trainer.run` that reports and saves after each step, whatever the clock shows."""

    def eager(self: Trainer, batches: Any, save: Any, *rest: Any, **options: Any) -> Any:
        return run(self, batches, save, *rest, **options | {"report_every": 0.0, "save_every": 0.0})

    return eager


class Killed(BaseException):
    """Simulates SIGKILL: nothing in the package may catch it, nor do more than close files."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


def at_step(stage: str, step: int, action: Callable[[], None] = die) -> Callable[[pytest.MonkeyPatch], None]:
    """Right before a step."""

    def install(patch: pytest.MonkeyPatch, advance: Any = Trainer.advance) -> None:
        def dying(self: Trainer, batch: Any) -> Any:
            if self.stage == stage and self.done == step:
                action()
            return advance(self, batch)

        patch.setattr(Trainer, "advance", dying)

    return install


def names_reached(loss: Tensor, modules: dict[str, torch.nn.Module]) -> set[str]:
    """Names of the modules with a parameter on which `loss` has a gradient other than zero."""
    named = [(name, p) for name, module in modules.items() for p in module.parameters() if p.requires_grad]
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        loss, [p for _, p in named], allow_unused=True, retain_graph=True
    )
    return {name for (name, _), grad in zip(named, grads, strict=True) if grad is not None and bool(grad.any())}


def stirred(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with noise on its parameters: layers initialised to zero pass no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def open_settings(section: Any, prefix: str = "") -> set[str]:
    """Settings that are still None."""
    inner = {f"{prefix}{k}": v for k, v in section}
    return {k for k, v in inner.items() if v is None}.union(
        *(open_settings(v, f"{k}.") for k, v in inner.items() if hasattr(v, "model_dump"))
    )
