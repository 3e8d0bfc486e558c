"""Small pictures, a `fit` that takes a second, and what a run left behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.model import PARTS, Model
from sfumato.training import fit
from sfumato.training.loop import Trainer

SMALL = (  # everything that the plan would take from the machine, and sizes that train in a moment
    "train.precision=fp32",
    "codec.width=16",
    "codec.perceptual_steps=2",
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
PLAIN = ("codec.perceptual=none", "codec.bottleneck=none")  # the quickest first stage


def pictures(count: int, shape: tuple[int, int, int], classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bars, columns and boxes with a little noise: (N, H, W, C) bytes and their class (N,)."""
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    label = np.arange(count) % classes
    x = rng.integers(0, 30, (count, height, width, channels))
    for image, kind in zip(x, label, strict=True):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        rows = slice(None) if kind == 1 else slice(top, top + height // 2)
        columns = slice(None) if kind == 0 else slice(left, left + width // 2)
        image[rows, columns] += rng.integers(120, 220, channels)
    return x.astype(np.uint8), label


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """The same as data: (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures(count, shape, seed=seed)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1


def small_fit(source: Path, out: Path, *overrides: str, steps: int = 20, **options: Any) -> Model:
    """Ten steps of each stage on the CPU."""
    return fit(str(source), out=out, steps=steps, overrides=[*SMALL, *overrides], device="cpu", **options)


def weights(run: Path) -> dict[str, Tensor]:
    """Every tensor of the finished model, by part and name."""
    present = [part for part in (*PARTS, "guide") if (run / part).is_dir()]
    parts = {part: load_file(run / part / "model.safetensors") for part in present}
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def rows(run: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def record(run: Path) -> dict[str, Any]:
    """What `run.json` holds."""
    return json.loads((run / "run.json").read_text())


def checkpoint(run: Path) -> dict[str, Any]:
    """The facts of the checkpoint."""
    return json.loads((run / "checkpoint" / "state.json").read_text())


def assert_same_run(run: Path, other: Path) -> None:
    """The two runs ended with the same weights, bit for bit, and recorded each step once."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    steps = [(row["stage"], row["step"]) for row in rows(run)]
    assert len(steps) == len(set(steps)), steps
    ours, theirs = record(run)["plan"], record(other)["plan"]
    assert ours == theirs, (ours, theirs)
    assert record(run)["done"] == ["codec", "denoiser"]


def reported_every_step(run: Any = Trainer.run) -> Any:
    """`Trainer.run` that reports and saves after each step, whatever the clock says."""

    def eager(self: Trainer, feed: Any, save: Any, *rest: Any, **options: Any) -> Any:
        return run(self, feed, save, *rest, **options | {"every": 0.0, "save_every": 0.0})

    return eager


def names_reached(loss: Tensor, modules: dict[str, torch.nn.Module]) -> set[str]:
    """Which modules have a parameter with a gradient of `loss` that is not zero."""
    named = [(name, p) for name, module in modules.items() for p in module.parameters() if p.requires_grad]
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        loss, [p for _, p in named], allow_unused=True, retain_graph=True
    )
    return {name for (name, _), grad in zip(named, grads, strict=True) if grad is not None and bool(grad.any())}


def stirred(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with noise on its parameters: layers that begin at zero would let no gradient through."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module
