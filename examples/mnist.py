"""MNIST, part by part: encoder, forward process, learned reverse, decoder, loss curve, samples.

`python examples/mnist.py` trains for five minutes (later calls reuse the model) and writes the pictures.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato.apps.progress import ProgressLine
from sfumato.modalities.image.read import read_source
from sfumato.modalities.image.write import sample_sheet
from sfumato.sampling import new_conditions
from sfumato.types import Latent


def draw_curves(run: Path, width: int = 800, height: int = 240) -> Image.Image:
    """The losses of both stages over the steps, one plot above the other."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    image = Image.new("RGB", (width, 2 * height), "white")
    pen = ImageDraw.Draw(image)
    for k, stage in enumerate(("codec", "denoiser")):
        points = [(row["step"], row["loss"]) for row in rows if row["stage"] == stage]
        last, low, high = points[-1][0], min(y for _, y in points), max(y for _, y in points)
        scale, base = (height - 60) / ((high - low) or 1), (k + 1) * height - 20
        at = lambda x, y, n=last, a=low, s=scale, b=base: (20 + (width - 40) * x / n, b - s * (y - a))
        pen.text((20, k * height + 10), f"{stage}: loss from {high:.3g} to {low:.3g} in {last} steps", "black")
        pen.line([at(0, low), at(last, low)], "gray")
        pen.line([at(*point) for point in points], "steelblue", 3)
    return image


def main(source="mnist", budget="5m", out="runs/mnist-example", steps=None, overrides: Sequence[str] = ()) -> Path:
    """Train (for `steps` instead of `budget`, if given), show each part, and return the folder of pictures."""
    run, pictures, budget = Path(out), Path(out) / "pictures", None if steps else budget
    if not (run / "model.json").is_file():
        sfumato.fit(source, budget=budget, steps=steps, out=run, overrides=overrides, progress=ProgressLine())
    model = sfumato.load(run)
    pictures.mkdir(exist_ok=True)
    draw_curves(run).save(pictures / "loss.png")

    x = read_source(source)[1].batch(range(8)).data  # held-out images (8, C, H, W)
    z = model.encode(x).z  # latents (8, *latent_shape) of zero mean and unit variance
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    noised = [model.denoiser.schedule(t).add_noise(z, eps) for t in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1)]
    path = [step.z for step in model.steps(range(8), new_conditions(model.conditioner, range(8), seed=0))]
    for name, states in {"forward": noised, "reverse": path, "reconstructions": [z]}.items():  # a row per item
        columns = ([x] if name == "reconstructions" else []) + [model.decode(Latent(z_t)).stack() for z_t in states]
        sample_sheet(torch.stack(columns, 1).flatten(0, 1), len(columns)).save(pictures / f"{name}.png")
    model.generate(100, seed=0, sheet=pictures / "samples.png", overwrite=True)
    return pictures


if __name__ == "__main__":
    print(f"pictures are in {main()}")
