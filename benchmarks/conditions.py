"""An image model of two labels and a number: are all three obeyed, also together? Prints a Markdown table.

    python benchmarks/conditions.py --budget 10m --count 2000
    python benchmarks/conditions.py --images 12000 --floors

Every digit of MNIST is drawn anew with a random stroke thickness and in one of four styles, into a folder of PNG images
with a metadata.csv of `file_name`, `digit`, `style` and `thickness` (in pixels). `sfumato fit` trains on it with
`--label-column digit,style,thickness`; then `sfumato.generate` is asked for all combinations of digits and styles, each
with random thicknesses of the training set.

The judge is a convolutional network that was trained on the same images to predict all three. The table has the
share of images whose digit, whose style, and in which both are as requested, and the correlation of the predicted
thickness with the requested one; for comparison the same of held-out real images. The last row is what is required of
generated images. OUT/generated.png and OUT/real.png show a digit per row and, in each, the styles from thin to thick.
The model is stored in OUT and reused; with other --images or --set it is refused. `--floors` judges real images only.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from quality import call, load_record, print_all, save_record
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

import sfumato
from sfumato.hardware import best_precision
from sfumato.modalities.image.classifier import Classifier, endless_batches
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.semi_supervised import random_shift
from sfumato.modalities.image.write import sample_sheet

Image8 = NDArray[np.uint8]
Field = NDArray[np.float64]
Mask = NDArray[np.bool_]
STYLES = ("plain", "inverted", "outline", "striped")
SIDE = 28  # of the images, pixels
SCALE = 4  # strokes are drawn at this multiple of the resolution
THICKNESS = (1.5, 4.5)  # range from which stroke thicknesses are drawn, pixels
MAX_THINNING = 0.5  # share of a stroke that is removed at most, so that it does not break
RING, STRIPE = 1.0, 4  # width of an outline and period of the stripes, pixels
STRIPE_LEVEL = np.uint8(128)  # brightness of the stripes
HELD_OUT = 5_000  # real images that the judge is tried on
LEVELS = 5  # thicknesses requested for each digit and style
BARS = {"digit": 0.97, "style": 0.97, "thickness": 0.95}  # required of generated images
WIDTH, BATCH, STEPS = 24, 128, 2_000  # of the judge: channels, images per step, optimizer steps
LR, WEIGHT_DECAY = 4e-3, 0.02  # of the judge: peak AdamW rate
MAX_SHIFT = 2  # the judge sees images shifted by up to so many pixels


class Drawings(NamedTuple):
    """Images (N, 1, 28, 28) in [-1, 1], class numbers (N,) of digit and style, stroke thicknesses (N,), pixels."""

    x: Tensor
    digit: Tensor
    style: Tensor
    thickness: Tensor


class Scores(NamedTuple):
    """Share of images with the right digit, the right style and both; correlation of the thickness."""

    digit: float
    style: float
    both: float
    thickness: float


def border_distance(mask: Mask) -> Field:
    """Distance of each point of a mask at `SCALE` to its border in pixels, negative outside.

    Half a point is subtracted because distances are measured to the centre of the nearest point on the other side.
    """
    return np.where(mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask)) / SCALE


def coverage(distance: Field) -> Field:
    """The share of each point's area that is inside, from its distance to the border."""
    return np.clip(distance * SCALE + 0.5, 0, 1)


def mean_thickness(distance: Field) -> float:
    """Mean thickness of strokes in pixels, from the distance of each point to their border.

    In a straight stroke of thickness w the distance is distributed uniformly in 0..w/2: its mean is w/4.
    """
    return float(4 * np.average(np.maximum(distance, 0), weights=coverage(distance)))


def shrink(field: Field) -> Image8:
    """Mean of the points of each pixel: (28 SCALE, 28 SCALE) in 0..1 -> (28, 28) in 0..255."""
    height, width = (side // SCALE for side in field.shape)
    return np.rint(255 * field.reshape(height, SCALE, width, SCALE).mean((1, 3))).astype(np.uint8)


def render(distance: Field, style: str) -> Image8:
    """An image (28, 28) of strokes, from the distance of each point at `SCALE` to their border."""
    if style == "outline":
        return shrink(coverage(distance + RING) - coverage(distance))
    ink = shrink(coverage(distance))
    if style == "striped":
        rows, columns = np.indices(ink.shape)
        return np.where((rows + columns) % STRIPE < STRIPE // 2, np.maximum(ink, STRIPE_LEVEL), ink)
    return 255 - ink if style == "inverted" else ink


def draw(mask: Mask, style: str, thickness: float) -> tuple[Image8, float]:
    """An image (28, 28) of a glyph at `SCALE` whose strokes have about this thickness; and their exact thickness.

    Strokes become thinner or thicker by a shift of their border, in or out.
    """
    distance = border_distance(mask)
    old = mean_thickness(distance)
    distance += max(thickness - old, -MAX_THINNING * old) / 2
    return render(distance, style), mean_thickness(distance)


def draw_all(pixels: NDArray[np.uint8], digits: NDArray[np.int64], seed: int) -> Drawings:
    """Digits (N, 28, 28), each drawn in a random style and with a random thickness."""
    rng = np.random.default_rng(seed)
    styles, targets = rng.integers(0, len(STYLES), len(pixels)), rng.uniform(*THICKNESS, len(pixels))
    drawn: list[tuple[Image8, float]] = []
    for image, style, target in zip(torch.from_numpy(pixels), styles, targets, strict=True):
        fine = F.interpolate(image.float()[None, None], scale_factor=SCALE, mode="bicubic")[0, 0].numpy()
        drawn.append(draw(fine > fine.max() / 2, STYLES[style], target))
    x = torch.from_numpy(np.stack([image for image, _ in drawn]))[:, None] / 127.5 - 1
    return Drawings(x, torch.from_numpy(digits), torch.from_numpy(styles), torch.tensor([t for _, t in drawn]))


def read_drawings(images: int, seed: int) -> tuple[Drawings, Drawings]:
    """Drawings of random training and test images of MNIST, `images` and `HELD_OUT` of them."""
    drawings: list[Drawings] = []
    for k, (data, count) in enumerate(zip(read_images("mnist"), (images, HELD_OUT), strict=True)):
        assert data is not None and data.labels is not None
        chosen = np.random.default_rng([seed, k]).permutation(len(data))[:count]
        drawings.append(draw_all(data.pixels[chosen, ..., 0], data.labels[chosen], seed + k))
    return drawings[0], drawings[1]


def write_folder(folder: Path, drawings: Drawings) -> Path:
    """The folder of PNG images with metadata.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:06}.png" for i in range(len(drawings.x))]
    for name, pixels in zip(names, ((drawings.x[:, 0] + 1) * 127.5).round().byte().numpy(), strict=True):
        Image.fromarray(pixels).save(folder / name)
    styles = [STYLES[k] for k in drawings.style]
    columns = {"digit": drawings.digit.numpy(), "style": styles, "thickness": drawings.thickness.numpy().round(2)}
    pd.DataFrame({"file_name": names} | columns).to_csv(folder / "metadata.csv", index=False)
    return folder


class Judge(nn.Module):
    """A convolutional network with three heads: logits of the digit, of the style, and the thickness.

    Args:
        mean: Mean thickness, pixels.
        std: Standard deviation of the thickness, pixels.
    """

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.net = Classifier((1, SIDE, SIDE), 10 + len(STYLES) + 1, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 10) and (B, 4), and the standardised thickness (B,), of images (B, 1, 28, 28) in [-1, 1]."""
        digit, style, thickness = self.net(x).float().split([10, len(STYLES), 1], 1)
        return digit, style, thickness[:, 0]

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Digits, styles and thicknesses in pixels, each (N,), of images (N, 1, 28, 28)."""
        outputs = [self(part) for part in x.split(1_000)]
        digit, style, thickness = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return digit.argmax(1), style.argmax(1), thickness * self.std + self.mean


def train_judge(data: Drawings, seed: int, steps: int = STEPS) -> Judge:
    """The judge: cross-entropy of both labels and squared error of the standardised thickness."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge(float(data.thickness.mean()), float(data.thickness.std())).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    order = endless_batches(len(data.x), min(BATCH, len(data.x)), generator)
    for _ in range(steps):
        index = next(order)
        x = random_shift(data.x[index], MAX_SHIFT, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=best_precision("cpu") == "bf16"):
            digit, style, thickness = judge(x)
        target = (data.thickness[index] - judge.mean) / judge.std
        labels = F.cross_entropy(digit, data.digit[index]) + F.cross_entropy(style, data.style[index])
        optimizer.zero_grad(set_to_none=True)
        (labels + F.mse_loss(thickness, target)).backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def evaluate(judge: Judge, data: Drawings) -> Scores:
    """How far images are what they are said to be."""
    digit, style, thickness = judge.predict(data.x)
    right = digit == data.digit, style == data.style
    correlation = torch.corrcoef(torch.stack([thickness.double(), data.thickness.double()]))[0, 1]
    shares = (float(share.float().mean()) for share in (*right, right[0] & right[1]))
    return Scores(*shares, float(correlation))


def train_model(drawings: Drawings, options: argparse.Namespace) -> Path:
    """The run folder, trained if it is missing."""
    run: Path = options.out / f"{options.budget}-{options.seed}"
    request = {"images": options.images, "set": options.set}
    load_record(options.out / f"{run.name}.json", request)
    if not (run / "model.json").is_file():
        folder = write_folder(options.out / f"drawings-{options.images}-{options.seed}", drawings)
        flags = ["--out", str(run), "--budget", options.budget, "--seed", str(options.seed), "--overwrite"]
        flags += [word for setting in options.set for word in ("--set", setting)]
        done = call(["-m", "sfumato", "fit", str(folder), "--label-column", "digit,style,thickness", *flags])
        save_record(options.out / f"{run.name}.json", request | {"seconds": done.seconds})
    return run


def requests(known: Drawings, seed: int) -> Iterator[tuple[int, int, float]]:
    """Digit, style and thickness of each group of images: of `LEVELS` equal parts of the training thicknesses of each
    digit and style a random one, from thin to thick."""
    rng = np.random.default_rng(seed)
    for digit, style in product(range(10), range(len(STYLES))):
        thickness = known.thickness[(known.digit == digit) & (known.style == style)].numpy()
        for quantile in (np.arange(LEVELS) + rng.random(LEVELS)) / LEVELS:
            yield digit, style, round(float(np.quantile(thickness, quantile)), 2)


def generate(run: Path, known: Drawings, count: int, seed: int) -> Drawings:
    """About `count` generated images, equally many of each group of `requests`, and what was requested."""
    model = sfumato.load(run)
    groups = list(requests(known, seed))
    each = max(1, count // len(groups))
    parts: list[Tensor] = []
    for number, (digit, style, thickness) in enumerate(groups):
        label = [f"digit={digit}", f"style={STYLES[style]}", f"thickness={thickness}"]
        result = sfumato.generate(model, n=each, label=label, seed=seed * len(groups) + number)
        parts.append(torch.stack(list(result.items)))
    digits, styles, thicknesses = (torch.tensor(column).repeat_interleave(each) for column in zip(*groups, strict=True))
    return Drawings(torch.cat(parts), digits, styles, thicknesses)


def sheet(data: Drawings, groups: Sequence[tuple[int, int, float]]) -> Image.Image:
    """A digit per row and, in each, the styles from thin to thick: of each group the image nearest to its thickness."""
    shown: list[int] = []
    for digit, style, thickness in groups:
        distance = (data.thickness - thickness).abs()
        other = (data.digit != digit) | (data.style != style)
        shown.append(int(distance.masked_fill(other, torch.inf).argmin()))
    return sample_sheet(data.x[shown], len(groups) // 10)


def table_row(name: str, count: int, scores: Scores, seconds: float | None = None) -> str:
    """A row of the table."""
    cells = [name, str(count), *(f"{score:.4f}" for score in scores), "" if seconds is None else f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the Markdown table."""
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = read_drawings(options.images, options.seed)
    groups = list(requests(train, options.seed))
    sheet(train, groups).save(options.out / "real.png")
    start = time.perf_counter()
    judge = train_judge(train, options.seed)
    seconds = time.perf_counter() - start
    yield "| images | number | digit | style | both | thickness | seconds |"
    yield "|---|---|---|---|---|---|---|"
    yield table_row("held-out", len(test.x), evaluate(judge, test), seconds)
    if options.floors:
        return
    run = train_model(train, options)
    start = time.perf_counter()
    generated = generate(run, train, options.count, options.seed)
    seconds = time.perf_counter() - start
    sheet(generated, groups).save(options.out / "generated.png")
    yield table_row("generated", len(generated.x), evaluate(judge, generated), seconds)
    yield f"| required | | {BARS['digit']} | {BARS['style']} | | {BARS['thickness']} | |"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10m", help="training budget")
    parser.add_argument("--count", type=int, default=2_000, help="number of generated images")
    parser.add_argument("--images", type=int, default=30_000, help="number of training images, up to 60,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--floors", action="store_true", help="judge held-out real images only")
    parser.add_argument("--out", type=Path, default=Path("runs/conditions"), help="folder of images, run and sheets")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    options = read_options(argv)
    return print_all([("conditions", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
