"""Unpaired style transfer of digits. Prints a Markdown table with a row per method and style.

    python benchmarks/transfer.py --data mnist --budget 10m

The training images are split into five disjoint parts, one per style, so that no digit appears in two styles: plain,
thick (3 x 3 dilation), outlined (dilation minus erosion), inverted (255 - x) and slanted (each row shifted by half a
pixel per row below the middle). `sfumato fit` trains with the style as the class. Test digits are then translated from
plain to each style and back by

* transfer: with its defaults;
* residual map only: `--strength 0`, the map that `transfer` finds, its residual network included;
* linear map only: `--strength 0 --rounds 0`, its linear part;
* moments only: `--strength 0 --rounds 0 --align 0`, the optimal transport map between the Gaussians;
* edit: SDEdit at each strength from 0.2 to 0.9; the one with the best PSNR is printed;
* nothing: the digits unchanged.

`label` is the share of digits that a digit classifier (trained on all styles) still recognises, `style` the share in
which a style classifier sees the target style, PSNR is to the same digit in that style. The row `truth` is that digit
itself, `coded` its reconstruction: the loss of the codec alone. The model is stored in OUT and reused; with other --set
it is refused. Keep the machine otherwise idle.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from quality import fit_once, print_all
from scipy import ndimage
from torch import Tensor

import sfumato
from sfumato.data.conditions import LABEL, Labels
from sfumato.modalities.image.classifier import Classifier, fit_classifier, predict
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.metrics import psnr
from sfumato.modalities.image.read import read_images

Pixels = NDArray[np.uint8]
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 1_000  # training steps of the classifiers
SLANT = 0.5  # pixels of shift per row


def thick(x: Pixels) -> Pixels:
    """Strokes one pixel wider on each side."""
    return ndimage.grey_dilation(x, (1, 3, 3))


def outlined(x: Pixels) -> Pixels:
    """Only the borders of strokes."""
    return ndimage.grey_dilation(x, (1, 3, 3)) - ndimage.grey_erosion(x, (1, 3, 3))


def inverted(x: Pixels) -> Pixels:
    """Black on white."""
    return 255 - x


def slanted(x: Pixels) -> Pixels:
    """Slanted to the right by half a pixel per row."""
    middle = (x.shape[1] - 1) / 2
    matrix = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, SLANT, 1.0]])
    return ndimage.affine_transform(x, matrix, (0.0, 0.0, -SLANT * middle), order=1)


STYLES: dict[str, Callable[[Pixels], Pixels]] = {
    "plain": lambda x: x,
    "thick": thick,
    "outlined": outlined,
    "inverted": inverted,
    "slanted": slanted,
}


class Classifiers(NamedTuple):
    """Classifiers of digits and of styles."""

    digits: Classifier
    styles: Classifier


class Scores(NamedTuple):
    """Share of labels kept, share of styles reached, PSNR to the truth in dB."""

    label: float
    style: float
    psnr: float


def pixels(x: Tensor) -> Pixels:
    """Images (N, 1, H, W) in [-1, 1] as bytes (N, H, W)."""
    return ((x[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def from_pixels(x: Pixels) -> Tensor:
    """Bytes (N, H, W) as images (N, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(x[:, None]).float() / 127.5 - 1


def styled(train: ImageDataset) -> tuple[Pixels, list[str], NDArray[np.int64]]:
    """The training images, a fifth in each style, with styles and digits."""
    x, digits = pixels(train.batch(np.arange(len(train))).data), train.labels
    assert digits is not None
    order = np.random.default_rng(0).permutation(len(x))
    parts = np.array_split(order, len(STYLES))
    images = np.concatenate([style(x[part]) for style, part in zip(STYLES.values(), parts, strict=True)])
    names = [name for name, part in zip(STYLES, parts, strict=True) for _ in part]
    return images, names, digits[np.concatenate(parts)]


def train_classifiers(images: Pixels, names: Sequence[str], digits: NDArray[np.int64]) -> Classifiers:
    """Train both on real images in all styles."""
    styles = np.array([list(STYLES).index(name) for name in names])
    classes = [str(k) for k in range(int(digits.max()) + 1)]
    sets = [
        ImageDataset(images[..., None], "L", conditions={LABEL: labels})
        for labels in (Labels(digits, classes), Labels(styles, list(STYLES)))
    ]
    return Classifiers(*(fit_classifier(data, data.classes, steps=STEPS) for data in sets))


def score(classifiers: Classifiers, x: Tensor, truth: Tensor, digits: Tensor, style: str) -> Scores:
    """Scores of translated digits."""
    label = float((predict(classifiers.digits, x) == digits).float().mean())
    reached = float((predict(classifiers.styles, x) == list(STYLES).index(style)).float().mean())
    return Scores(label, reached, psnr(x, truth))


Scorer = Callable[[Tensor], Scores]


def methods(run: Path, digits: Path, source: str, target: str, scorer: Scorer) -> Iterator[tuple[str, Scores]]:
    """Scores of each method from one style to another."""
    options: dict[str, dict[str, Any]] = {
        "transfer": {},
        "residual map only": {"strength": 0.0},
        "linear map only": {"strength": 0.0, "rounds": 0},
        "moments only": {"strength": 0.0, "rounds": 0, "align": 0},
    }
    for name, extra in options.items():
        yield name, scorer(sfumato.transfer(run, digits, source_label=source, label=target, **extra).items.stack())
    edited = {s: scorer(sfumato.edit(run, digits, label=target, strength=s).items.stack()) for s in STRENGTHS}
    best = max(edited, key=lambda strength: edited[strength].psnr)
    yield f"edit at {best}", edited[best]


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the Markdown table."""
    train, test = read_images(options.data)
    images, names, digits = styled(train)
    options.out.mkdir(parents=True, exist_ok=True)
    name = Path(options.data).name
    source, run = options.out / f"{name}-styles.npz", options.out / f"{name}-{options.budget}-{options.seed}"
    np.savez(source, images=images, labels=np.array(names))
    fit_once(lambda: source, run, {"set": options.set}, options)
    classifiers = train_classifiers(images, names, digits)
    assert test is not None and test.labels is not None
    given, digit_classes = test.batch(np.arange(options.items)).data, torch.from_numpy(test.labels[: options.items])
    yield "| from | to | method | label | style | PSNR |"
    yield "|---|---|---|---|---|---|"
    pairs = [(a, b) for a, b in [("plain", s) for s in STYLES] + [(s, "plain") for s in STYLES] if a != b]
    for start, end in pairs:
        x, truth = (from_pixels(STYLES[style](pixels(given))) for style in (start, end))
        for name, items in (("given", x), ("truth", truth)):
            np.savez(options.out / f"{name}.npz", images=pixels(items))
        coded = sfumato.reconstruct(run, options.out / "truth.npz").items.stack()

        def scorer(items: Tensor, truth: Tensor = truth, end: str = end) -> Scores:
            return score(classifiers, items, truth, digit_classes, end)

        results = methods(run, options.out / "given.npz", start, end, scorer)
        for name, scores in [*results, ("nothing", scorer(x)), ("coded", scorer(coded)), ("truth", scorer(truth))]:
            yield f"| {start} | {end} | {name} | {scores.label:.3f} | {scores.style:.3f} | {scores.psnr:.1f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=500, help="number of test digits")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the run")
    options = parser.parse_args(argv)
    return print_all([("transfer", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
