"""Quality of samplers against network evaluations: a Markdown table with a row per sampler, grid and guidance.

    python benchmarks/samplers.py runs/mnist
    python benchmarks/samplers.py runs/mnist --samplers abm2:both_ends --guidance 1,1.2 --precision bf16

A column is a number of denoiser evaluations (guidance doubles the network evaluations of each, autoguidance doubles
them again). A cell has the root-mean-square error of the latents against 100 steps of abm2 in float32 from the same
noise (latents have unit variance), and the Fréchet distance of the images to the training set, on the features of this
project's own classifier. The column ∞ has the distance of the 100 steps. Distances of 5,000 images differ by about 1 %
between seeds; here all share their noise, so smaller differences are meaningful.
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
from sfumato.core import denoiser_evaluations
from sfumato.metrics import extract, frechet, reference
from sfumato.modalities.image.evaluator import ImageEvaluator
from sfumato.modalities.image.metrics import GeneratedImages
from sfumato.model import Model, load
from sfumato.sampling import Sampling, new_conditions
from sfumato.storage import read_json
from sfumato.types import Latent

EVALUATIONS = (4, 6, 8, 10, 15, 20, 30, 60)  # of the denoiser
SAMPLERS = "euler:uniform,heun:uniform,dpmpp_2m:uniform,unipc:uniform,unipc:both_ends,abm2:uniform,abm2:both_ends"
CONVERGED = {"sampler": "abm2", "grid": "both_ends", "steps": 100, "precision": "fp32"}

Distance = Callable[[Tensor], float]


def make_distance(model: Model, source: str) -> Distance:
    """Images (N, C, H, W) -> Fréchet distance to the training part of the source."""
    train, _ = model.modality.read_split(source, DataSettings(), model.config.spec)
    evaluator = ImageEvaluator(train, str(model.device))
    real = reference(train, evaluator.extractor, evaluator.cache).moments  # pyright: ignore[reportArgumentType]
    return lambda x: frechet(extract(evaluator.extractor, GeneratedImages(x)), real)


def sample(model: Model, sampling: Sampling, items: int, batch: int) -> tuple[Tensor, Tensor]:
    """Latents and images of the first items, class-balanced."""
    model.config.sample |= {"precision": sampling.precision}  # the decoder's too
    raw = new_conditions(model.conditioner, range(items), 0)
    parts = [
        model.sample(index.tolist(), raw.select(index), sampling=sampling) for index in torch.arange(items).split(batch)
    ]
    latent = Latent.concat(parts)
    return latent.z, model.decode(latent).stack()


def steps_for(sampler: str, evaluations: int) -> int:
    """The most steps within a number of denoiser evaluations."""
    return max(steps for steps in range(1, evaluations + 1) if denoiser_evaluations(sampler, steps) <= evaluations)


def table_cells(
    model: Model, sampling: Sampling, distance: Distance, converged: Tensor, options: argparse.Namespace
) -> list[str]:
    """The cells of a sampler: error / distance for each number of evaluations."""
    cells: list[str] = []
    for evaluations in options.evaluations:
        steps = steps_for(sampling.sampler, evaluations)
        z, x = sample(model, replace(sampling, steps=steps), options.items, options.batch)
        cells.append(f"{float((z - converged).square().mean().sqrt()):.3f} / {distance(x):.3f}")
        print(sampling.sampler, sampling.grid, sampling.guidance, evaluations, cells[-1], file=sys.stderr, flush=True)
    return cells


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model of images")
    parser.add_argument("--source", help="its training source (default: that of run.json)")
    parser.add_argument("--samplers", default=SAMPLERS, help="sampler:grid, separated by commas")
    parser.add_argument("--evaluations", type=numbers(int), default=list(EVALUATIONS))
    parser.add_argument("--guidance", type=numbers(float), help="guidance weights (default: 1 and the model's own)")
    parser.add_argument("--interval", type=numbers(float), help="guided times lo,hi (default: all)")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="precision of all but the converged samples"
    )
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--batch", type=int, default=500)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = read_options(argv)
    model = load(options.model)
    defaults = model.sampling
    distance = make_distance(model, options.source or read_json(options.model / "run.json")["source"])
    head: list[Any] = ["sampler", "grid", "w", *options.evaluations, "∞"]
    print(f"| {' | '.join(map(str, head))} |\n|{'---|' * len(head)}", flush=True)
    converged_by_weight: dict[float, tuple[Tensor, float]] = {}
    for weight, name in product(options.guidance or sorted({1.0, defaults.guidance}), options.samplers.split(",")):
        sampling = replace(defaults, guidance=weight, interval=options.interval, precision=options.precision)
        if weight not in converged_by_weight:
            z, x = sample(model, replace(sampling, **CONVERGED), options.items, options.batch)
            converged_by_weight[weight] = z, distance(x)
        converged, converged_distance = converged_by_weight[weight]
        sampler, grid = name.split(":")
        cells = table_cells(model, replace(sampling, sampler=sampler, grid=grid), distance, converged, options)
        print(f"| {' | '.join([sampler, grid, f'{weight:g}', *cells, f'{converged_distance:.3f}'])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
