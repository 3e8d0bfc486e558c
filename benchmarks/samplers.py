"""What a sampler reaches with how many calls of the network: one row of a Markdown table a sampler, grid and guidance.

    python benchmarks/samplers.py runs/mnist
    python benchmarks/samplers.py runs/mnist --samplers abm2:ends --guidance 1,1.2 --interval 0.1,0.9 --precision bf16

A cell is, for so many calls of the denoiser (each twice as dear where guidance is on, and twice again where the model
has autoguidance): how far the latents are from those that the same noise leads to in 100 steps of abm2 in float32 (root
mean square; latents have unit variance), and the Fréchet distance of the images to the training set, on the features of
this project's own classifier. The column ∞ has the distance of the 100 steps themselves. Distances of 5,000 images
differ by about 1 % between seeds, but here all share their noise, so smaller differences count.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.config import DataSettings
from sfumato.core import denoiser_calls
from sfumato.metrics import Samples, extract, frechet, reference
from sfumato.modality.judge import ImageJudge
from sfumato.model import Model, Sampling, load, read_json

CALLS = (4, 6, 8, 10, 15, 20, 30, 60)
SAMPLERS = "euler:uniform,heun:uniform,dpmpp_2m:uniform,unipc:uniform,unipc:ends,abm2:uniform,abm2:ends"
CONVERGED = {"sampler": "abm2", "grid": "ends", "steps": 100, "precision": "fp32"}

Distance = Callable[[Tensor], float]


def make_distance(model: Model, source: str) -> Distance:
    """Images (N, C, H, W) -> their Fréchet distance to the training part of the source."""
    train, _ = model.modality.read(source, DataSettings(), model.card.mode)
    judge = ImageJudge(train, str(model.device))
    real = reference(train, judge.extractor, judge.cache).moments  # pyright: ignore[reportArgumentType]
    return lambda x: frechet(extract(judge.extractor, Samples(x)), real)


def drawn(model: Model, how: Sampling, items: int, batch: int) -> tuple[Tensor, Tensor]:
    """Latents and images of the first items, evenly over the classes."""
    model.card.sample |= {"precision": how.precision}  # the decoder's too
    labels = model.labels_for(range(items), 0)
    parts = [
        model.sample(some.tolist(), None if labels is None else labels[some], how=how)
        for some in torch.arange(items).split(batch)
    ]
    z = torch.cat(parts)
    return z, model.decode(z)


def steps_for(sampler: str, calls: int) -> int:
    """The most steps that take no more calls than these."""
    return max(steps for steps in range(1, calls + 1) if denoiser_calls(sampler, steps) <= calls)


def table_row(model: Model, how: Sampling, distance: Distance, goal: Tensor, options: argparse.Namespace) -> list[str]:
    """The cells of a sampler: error / distance for each number of calls."""
    cells: list[str] = []
    for calls in options.calls:
        steps = steps_for(how.sampler, calls)
        z, x = drawn(model, replace(how, steps=steps), options.items, options.batch)
        cells.append(f"{float((z - goal).square().mean().sqrt()):.3f} / {distance(x):.3f}")
        print(how.sampler, how.grid, how.guidance, calls, cells[-1], file=sys.stderr, flush=True)
    return cells


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model of images")
    parser.add_argument("--source", help="what it was trained on; default as its run.json says")
    parser.add_argument("--samplers", default=SAMPLERS, help="sampler:grid, separated by commas")
    parser.add_argument("--calls", type=numbers(int), default=list(CALLS))
    parser.add_argument("--guidance", type=numbers(float), help="weights; default 1 and the model's own")
    parser.add_argument("--interval", type=numbers(float), help="times lo,hi that are guided; default all")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of all but the converged ones")
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--batch", type=int, default=500)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = read_options(words)
    model = load(options.model)
    own = model.sampling
    distance = make_distance(model, options.source or read_json(options.model / "run.json")["source"])
    head: list[Any] = ["sampler", "grid", "w", *options.calls, "∞"]
    print(f"| {' | '.join(map(str, head))} |\n|{'---|' * len(head)}", flush=True)
    goals: dict[float, tuple[Tensor, float]] = {}
    for weight, name in product(options.guidance or sorted({1.0, own.guidance}), options.samplers.split(",")):
        how = replace(own, guidance=weight, interval=options.interval, precision=options.precision)
        if weight not in goals:
            z, x = drawn(model, replace(how, **CONVERGED), options.items, options.batch)
            goals[weight] = z, distance(x)
        goal, best = goals[weight]
        sampler, grid = name.split(":")
        cells = table_row(model, replace(how, sampler=sampler, grid=grid), distance, goal, options)
        print(f"| {' | '.join([sampler, grid, f'{weight:g}', *cells, f'{best:.3f}'])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
