"""How well digits are carried over into styles they were never seen in: one row of a Markdown table a way and style.

    python benchmarks/transfer.py --data mnist --budget 10m

Five styles are made from the training images, each from a fifth of its own, so that no digit is there in two: plain,
thick (the largest value in 3 x 3 pixels), outlined (largest less smallest value), inverted (255 - x) and slanted (rows
moved by half a pixel for each that they lie below the middle). `sfumato fit` learns them with the style for a class.
Test digits are then carried over from plain into each style and back by

* transfer: with its defaults;
* bent alone: `--strength 0`, the map that `transfer` finds, with what its small network adds;
* aligned alone: `--strength 0 --rounds 0`, the linear map of it;
* moments alone: `--strength 0 --rounds 0 --align 0`, the map that moves items least;
* edit: noise and another label, at each strength of 0.2 to 0.9; the best one by distance is printed;
* nothing: the digits as they are.

`label` is the share in which a classifier of digits (trained on all styles) sees the digit, `style` the share in
which a classifier of styles sees the style, PSNR is to the very same digit in that style; the row `truth` is that
digit itself, `coded` that digit through the codec and back: what the codec alone costs. The model is kept in OUT and
not made again; of other --set it is refused. Keep the machine quiet meanwhile.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from quality import fit_once, print_all
from scipy import ndimage
from torch import Tensor

import sfumato
from sfumato.data import Data, read_images
from sfumato.metrics import psnr
from sfumato.nn.classifier import Classifier, fit_classifier, predict

Pixels = NDArray[np.uint8]
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 1_000  # of the classifiers
SLANT = 0.5  # pixels to the side for each row


def thick(x: Pixels) -> Pixels:
    """Strokes wider by a pixel on each side."""
    return ndimage.grey_dilation(x, (1, 3, 3))


def outlined(x: Pixels) -> Pixels:
    """The border of strokes alone."""
    return ndimage.grey_dilation(x, (1, 3, 3)) - ndimage.grey_erosion(x, (1, 3, 3))


def inverted(x: Pixels) -> Pixels:
    """Black on white."""
    return 255 - x


def slanted(x: Pixels) -> Pixels:
    """Leaning to the right by half a pixel a row."""
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


class Judges(NamedTuple):
    """Classifiers of digits and of styles."""

    digits: Classifier
    styles: Classifier


class Scores(NamedTuple):
    """Shares of labels kept and styles reached, and the distance from the truth in dB."""

    label: float
    style: float
    psnr: float


def pixels(x: Tensor) -> Pixels:
    """Images (N, 1, H, W) in [-1, 1] as bytes (N, H, W)."""
    return ((x[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def images(x: Pixels) -> Tensor:
    """And back."""
    return torch.from_numpy(x[:, None]).float() / 127.5 - 1


def styled(train: Data) -> tuple[Pixels, list[str], NDArray[np.int64]]:
    """Each fifth of the training images in a style of its own, with its style and its digit."""
    x, digits = pixels(train.batch(np.arange(len(train))).data), train.labels
    assert digits is not None
    order = np.random.default_rng(0).permutation(len(x))
    parts = np.array_split(order, len(STYLES))
    made = np.concatenate([style(x[part]) for style, part in zip(STYLES.values(), parts, strict=True)])
    names = [name for name, part in zip(STYLES, parts, strict=True) for _ in part]
    return made, names, digits[np.concatenate(parts)]


def judges(made: Pixels, names: Sequence[str], digits: NDArray[np.int64]) -> Judges:
    """Train both on real images in all styles."""
    styles = np.array([list(STYLES).index(name) for name in names])
    sets = [Data(made[..., None], "L", labels=labels) for labels in (digits, styles)]
    return Judges(*(fit_classifier(data, int(data.labels.max()) + 1, steps=STEPS) for data in sets))  # type: ignore[union-attr]


def score(judges: Judges, x: Tensor, truth: Tensor, digits: Tensor, style: str) -> Scores:
    """What became of digits."""
    label = float((predict(judges.digits, x) == digits).float().mean())
    reached = float((predict(judges.styles, x) == list(STYLES).index(style)).float().mean())
    return Scores(label, reached, psnr(x, truth))


Judge = Callable[[Tensor], Scores]


def ways(run: Path, source: Path, begin: str, end: str, judge: Judge) -> Iterator[tuple[str, Scores]]:
    """Each way of getting from one style to another."""
    for name, how in (
        ("transfer", {}),
        ("bent alone", {"strength": 0.0}),
        ("aligned alone", {"strength": 0.0, "rounds": 0}),
        ("moments alone", {"strength": 0.0, "rounds": 0, "align": 0}),
    ):
        yield name, judge(sfumato.transfer(run, source, own_label=begin, label=end, **how).items)
    tried = {s: judge(sfumato.edit(run, source, label=end, strength=s).items) for s in STRENGTHS}
    best = max(tried, key=lambda strength: tried[strength].psnr)
    yield f"edit at {best}", tried[best]


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines."""
    train, test = read_images(options.data)
    made, names, digits = styled(train)
    options.out.mkdir(parents=True, exist_ok=True)
    name = Path(options.data).name
    source, run = options.out / f"{name}-styles.npz", options.out / f"{name}-{options.budget}-{options.seed}"
    np.savez(source, images=made, labels=np.array(names))
    fit_once(lambda: source, run, {"set": options.set}, options)
    judged = judges(made, names, digits)
    few = test.batch(np.arange(options.items))
    assert few.label is not None
    yield "| from | to | by | label | style | PSNR |"
    yield "|---|---|---|---|---|---|"
    pairs = [(a, b) for a, b in [("plain", s) for s in STYLES] + [(s, "plain") for s in STYLES] if a != b]
    for begin, end in pairs:
        x, truth = (images(STYLES[style](pixels(few.data))) for style in (begin, end))
        for name, items in (("given", x), ("truth", truth)):
            np.savez(options.out / f"{name}.npz", images=pixels(items))
        coded = sfumato.reconstruct(run, options.out / "truth.npz").items

        def judge(items: Tensor, truth: Tensor = truth, end: str = end) -> Scores:
            return score(judged, items, truth, few.label, end)  # type: ignore[arg-type]

        found = ways(run, options.out / "given.npz", begin, end, judge)
        for name, scores in [*found, ("nothing", judge(x)), ("coded", judge(coded)), ("truth", judge(truth))]:
            yield f"| {begin} | {end} | {name} | {scores.label:.3f} | {scores.style:.3f} | {scores.psnr:.1f} |"


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=500, help="test digits")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    options = parser.parse_args(words)
    return print_all([("transfer", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
