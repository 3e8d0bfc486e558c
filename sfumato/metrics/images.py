"""Reports about generated and reconstructed images: every number beside what real held-out images score."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.metrics.distances import (
    density_coverage,
    frechet,
    kernel_distance,
    memorisation,
    precision_recall,
    psnr,
    ssim,
)
from sfumato.metrics.features import CHUNK, KEPT, Extractor, Images, extract, image_parts, pick, reference
from sfumato.types import UNKNOWN, Batch, at_once

Report = dict[str, float | int | str]
Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> (B, classes)

NEIGHBOURS = 5_000  # items of each set in precision, recall, density and coverage
CHECKED = 1_000  # items of each set whose nearest training item is looked for
PIXELS = 32  # larger images are averaged down to this side for that search


class Samples:
    """Images (N, C, H, W) in [-1, 1] at hand as a data set.

    Args:
        x: The images.
        labels: Their labels (N,), or None.
    """

    def __init__(self, x: Tensor, labels: Tensor | np.ndarray | None = None) -> None:
        self.x, self.labels = x, None if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels is not None and len(self.labels) != len(x):
            raise UserError(f"samples: {len(x)} images but {len(self.labels)} labels")

    @property
    def fingerprint(self) -> str:
        """A hash of the content."""
        return hashlib.sha256(self.x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.x)

    def batch(self, index: Tensor) -> Batch:
        """The images at `index` (B,)."""
        return Batch(self.x[index], index, None if self.labels is None else torch.from_numpy(self.labels)[index])

    def subset(self, index: Tensor) -> Self:
        """The images at `index` (B,) as a set of their own."""
        return type(self)(self.x[index], None if self.labels is None else torch.from_numpy(self.labels)[index])


def _distances(
    fake: Images, train: Images, held: Images, extractor: Extractor, cache: Path | None, seed: int
) -> Report:
    """Fréchet and kernel distance to the training set; precision to coverage against the held-out set."""
    real, other = reference(train, extractor, cache), reference(held, extractor, cache, max(KEPT, len(fake)))
    ours = extract(extractor, fake, pick(len(fake), len(fake), seed))
    n = min(len(fake), len(other.sample))
    floor = other.sample[:n]
    report: Report = {"n_floor": n, "fd": frechet(ours, real.moments), "fd_floor": frechet(floor, real.moments)}
    report |= {"kd": kernel_distance(ours, real.sample), "kd_floor": kernel_distance(floor, real.sample)}
    if len(fake) > n:
        report["fd_equal"] = frechet(ours[:n], real.moments)
    few = min(NEIGHBOURS, n, len(real.sample))
    for suffix, candidate in (("", ours), ("_floor", real.sample)):
        precision, recall = precision_recall(other.sample[:few], candidate[:few])
        density, coverage = density_coverage(other.sample[:few], candidate[:few])
        scores = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
        report |= {f"{name}{suffix}": value for name, value in scores.items()}
    return report


def thumbnails(x: Tensor) -> Tensor:
    """Images (B, C, H, W) as vectors (B, C * h * w), averaged down to at most 32 pixels a side."""
    height, width = (min(PIXELS, side) for side in x.shape[-2:])
    return F.adaptive_avg_pool2d(x, (height, width)).flatten(1)


def image_points(data: Images, index: Tensor | None = None) -> Iterator[Tensor]:
    """The thumbnails (b, D) of a data set, or of some of its items, a bounded number at a time."""
    return map(thumbnails, image_parts(data, index))


def _novelty(fake: Images, train: Images, held: Images, seed: int) -> dict[str, float]:
    ours, theirs = (torch.cat(list(image_points(v, pick(len(v), CHECKED, seed)))) for v in (fake, held))
    return memorisation(ours, image_points(train), theirs)


def label_accuracy(logits: Logits, data: Images) -> float:
    """Share of images in which the classifier sees their own label, among those that have one (NaN: none has)."""
    if data.labels is None:
        raise UserError("label accuracy: the images have no labels")
    with torch.no_grad():
        seen = torch.cat([logits(x).argmax(1).cpu() for x in image_parts(data)])
    known = data.labels != UNKNOWN
    return float((seen.numpy() == data.labels)[known].mean()) if known.any() else float("nan")


def image_report(
    fake: Images,
    train: Images,
    held: Images,
    extractor: Extractor,
    *,
    classifier: Logits | None = None,
    cas: Callable[[Images], Logits] | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> Report:
    """How good, varied and new generated images are; each `name` beside `name_floor`, the score of real images.

    Distances (`fd`, `kd`) are to the training set, their floors those of `n_floor` held-out images. `fd` falls as the
    sample grows: with more generated than held-out images, `fd_equal` is that of `n_floor` generated ones. Precision,
    recall, density and coverage take the held-out set as the real one, their floors come from training images.
    `novelty` and `copies` are measured in pixels.

    Args:
        fake: Generated images; `Samples(x, labels)` wraps tensors.
        train: Training images.
        held: Held-out images.
        extractor: Named feature extractor.
        classifier: Judges the labels, when generated and held-out images have them.
        cas: Trains a classifier on labelled images, to be tested on the held-out ones (classification accuracy score).
        cache: Folder for the statistics of the real sets.
        seed: Seed of the choice of subsets.

    Raises:
        UserError: `classifier` or `cas` is given but labels are missing.

    References:
        Ravuri and Vinyals 2019, Classification Accuracy Score, arXiv:1905.10887.
    """
    report: Report = {"n": len(fake), "n_train": len(train), "n_held": len(held), "extractor": extractor.name}
    report |= _distances(fake, train, held, extractor, cache, seed)
    report |= _novelty(fake, train, held, seed)
    if classifier is not None:
        report |= {"accuracy": label_accuracy(classifier, fake), "accuracy_floor": label_accuracy(classifier, held)}
    if cas is not None:
        assert train.labels is not None
        known = torch.from_numpy(np.flatnonzero(train.labels != UNKNOWN))
        real = train.subset(known[pick(len(known), len(fake), seed)])
        report |= {"cas": label_accuracy(cas(fake), held), "cas_floor": label_accuracy(cas(real), held)}
    return report


def reconstruction_report(x: Tensor, x_rec: Tensor, extractor: Extractor | None = None) -> dict[str, float]:
    """How close reconstructions are to their images: `psnr` (dB), `ssim`, `l1` on [-1, 1], and `rfd` on features.

    Args:
        x: Images (N, C, H, W) in [-1, 1].
        x_rec: Their reconstructions.
        extractor: Features for the Fréchet distance between the two sets; None leaves it out.
    """
    x_rec = x_rec.clamp(-1, 1)
    report = {"psnr": psnr(x, x_rec), "ssim": ssim(x, x_rec), "l1": float((x - x_rec).abs().mean())}
    if extractor is not None:
        chunk = at_once(x.shape[1:], CHUNK)
        a, b = (torch.cat([extractor(part) for part in v.split(chunk)]) for v in (x, x_rec))
        report["rfd"] = frechet(a, b)
    return report
