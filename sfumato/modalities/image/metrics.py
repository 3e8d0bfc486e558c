"""Metrics of generated and reconstructed images, each beside its floor: the score of real held-out images."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.metrics.distances import density_coverage, frechet, kernel_distance, memorisation, precision_recall
from sfumato.metrics.features import (
    FEATURE_BATCH,
    STORED_FEATURES,
    Extractor,
    ItemSet,
    extract,
    item_batches,
    random_indices,
    reference,
)
from sfumato.types import UNKNOWN, Batch, batch_limit

Report = dict[str, float | int | str]
Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> (B, classes)

NEIGHBOUR_ITEMS = 5_000  # items per set in precision, recall, density and coverage
NOVELTY_ITEMS = 1_000  # items per set whose nearest training item is searched for
THUMBNAIL_SIDE = 32  # largest side of the images in that search, pixels
PSNR_CHUNK, SSIM_CHUNK = 500, 64  # images per float64 computation


class GeneratedImages:
    """Generated images (N, C, H, W) in [-1, 1] as a data set.

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
        """sha256 of the pixels."""
        return hashlib.sha256(self.x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> Batch:
        """The images at `index` (B,)."""
        return Batch(self.x[index], index)

    def subset(self, index: Tensor) -> Self:
        """The images at `index` (B,) as a data set."""
        return type(self)(self.x[index], None if self.labels is None else torch.from_numpy(self.labels)[index])


def _distances(
    fake: ItemSet, train: ItemSet, held: ItemSet, extractor: Extractor, cache: Path | None, seed: int
) -> Report:
    """Fréchet and kernel distance to the training set; precision to coverage against the held-out set."""
    real = reference(train, extractor, cache)
    held_features = reference(held, extractor, cache, max(STORED_FEATURES, len(fake))).sample
    features = extract(extractor, fake, random_indices(len(fake), len(fake), seed))
    n = min(len(fake), len(held_features))
    floor = held_features[:n]
    report: Report = {"n_floor": n, "fd": frechet(features, real.moments), "fd_floor": frechet(floor, real.moments)}
    report |= {"kd": kernel_distance(features, real.sample), "kd_floor": kernel_distance(floor, real.sample)}
    if len(fake) > n:
        report["fd_equal"] = frechet(features[:n], real.moments)
    m = min(NEIGHBOUR_ITEMS, n, len(real.sample))
    for suffix, sample in (("", features), ("_floor", real.sample)):
        precision, recall = precision_recall(held_features[:m], sample[:m])
        density, coverage = density_coverage(held_features[:m], sample[:m])
        scores = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
        report |= {f"{name}{suffix}": value for name, value in scores.items()}
    return report


def thumbnails(x: Tensor) -> Tensor:
    """Images (B, C, H, W) as vectors (B, C * h * w), averaged down to at most `THUMBNAIL_SIDE` pixels a side."""
    height, width = (min(THUMBNAIL_SIDE, side) for side in x.shape[-2:])
    return F.adaptive_avg_pool2d(x, (height, width)).flatten(1)


def thumbnail_batches(data: ItemSet, index: Tensor | None = None) -> Iterator[Tensor]:
    """Thumbnails (b, D) of a data set, or of its items `index`, in batches of bounded size."""
    return map(thumbnails, item_batches(data, index))


def _novelty(fake: ItemSet, train: ItemSet, held: ItemSet, seed: int) -> dict[str, float]:
    """Distances of thumbnails to their nearest training item."""
    samples = (thumbnail_batches(v, random_indices(len(v), NOVELTY_ITEMS, seed)) for v in (fake, held))
    generated, real = (torch.cat(list(parts)) for parts in samples)
    return memorisation(generated, thumbnail_batches(train), real)


def label_accuracy(logits: Logits, data: ItemSet) -> float:
    """Share of the labelled images whose label the classifier predicts; NaN if none is labelled."""
    if data.labels is None:
        raise UserError("label accuracy: the images have no labels")
    with torch.no_grad():
        predicted = torch.cat([logits(x).argmax(1).cpu() for x in item_batches(data)])
    labelled = data.labels != UNKNOWN
    return float((predicted.numpy() == data.labels)[labelled].mean()) if labelled.any() else float("nan")


def image_report(
    fake: ItemSet,
    train: ItemSet,
    held: ItemSet,
    extractor: Extractor,
    *,
    classifier: Logits | None = None,
    cas: Callable[[ItemSet], Logits] | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> Report:
    """Quality, diversity and novelty of generated images; each `name` beside `name_floor`, the score of real images.

    Distances (`fd`, `kd`) are to the training set; their floors are those of `n_floor` held-out images. As `fd`
    decreases with the sample size, `fd_equal` uses `n_floor` generated images if there are more. For precision, recall,
    density and coverage the held-out set is the real one, and their floors are those of training images. `novelty` and
    `copies` use distances of thumbnails.

    Args:
        fake: Generated images; `GeneratedImages(x, labels)` wraps tensors.
        train: Training images.
        held: Held-out images.
        extractor: Named feature extractor.
        classifier: Logits for the label accuracy of generated and held-out images; None leaves it out.
        cas: Trains a classifier on labelled images, for the classification accuracy score on the held-out ones.
        cache: Folder for the statistics of the real sets.
        seed: Seed of the subsets.

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
        labelled = torch.from_numpy(np.flatnonzero(train.labels != UNKNOWN))
        real = train.subset(labelled[random_indices(len(labelled), len(fake), seed)])
        report |= {"cas": label_accuracy(cas(fake), held), "cas_floor": label_accuracy(cas(real), held)}
    return report


def reconstruction_report(x: Tensor, x_hat: Tensor, extractor: Extractor | None = None) -> dict[str, float]:
    """Reconstruction metrics: `psnr` (dB), `ssim`, `l1` on [-1, 1], and `rfd`, the Fréchet distance of features.

    Args:
        x: Images (N, C, H, W) in [-1, 1].
        x_hat: Their reconstructions.
        extractor: Features for `rfd`; None leaves it out.
    """
    x_hat = x_hat.clamp(-1, 1)
    report = {"psnr": psnr(x, x_hat), "ssim": ssim(x, x_hat), "l1": float((x - x_hat).abs().mean())}
    if extractor is not None:
        chunk = batch_limit(x.shape[1:], FEATURE_BATCH)
        a, b = (torch.cat([extractor(part) for part in v.split(chunk)]) for v in (x, x_hat))
        report["rfd"] = frechet(a, b)
    return report


def psnr(x: Tensor, y: Tensor, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio, 10 log10(value_range² / mse) dB, mean over images (B, C, H, W), each at most 100."""
    pairs = zip(x.split(PSNR_CHUNK), y.split(PSNR_CHUNK), strict=True)
    error = torch.cat([(u.double() - v.double()).square().flatten(1).mean(1) for u, v in pairs]) / value_range**2
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


def _gaussian_filter(x: Tensor, window: int, sigma: float = 1.5) -> Tensor:
    """Separable Gaussian filter of `window` taps, without padding: (B, C, H, W) -> (B, C, H-w+1, W-w+1)."""
    taps = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    kernel = torch.exp(-taps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, window)
    return F.conv2d(F.conv2d(x, kernel, groups=x.shape[1]), kernel.mT, groups=x.shape[1])


def ssim(x: Tensor, y: Tensor, value_range: float = 2.0, window: int = 11) -> float:
    """Structural similarity (SSIM), Gaussian window of sigma 1.5, mean over pixels, channels and images.

    Args:
        x: Images (B, C, H, W).
        y: Images (B, C, H, W).
        value_range: Largest possible value minus smallest.
        window: Taps of the window; reduced to the largest odd number that fits for smaller images.

    References:
        Wang et al. 2004, Image Quality Assessment, eq. 13.
    """
    side = min(x.shape[-2:])
    window = min(window, side - (side + 1) % 2)
    (c_1, c_2), scores = ((0.01 * value_range) ** 2, (0.03 * value_range) ** 2), []
    for u, v in zip(x.split(SSIM_CHUNK), y.split(SSIM_CHUNK), strict=True):
        u, v = u.double(), v.double()
        m_u, m_v, uu, vv, uv = (_gaussian_filter(w, window) for w in (u, v, u * u, v * v, u * v))
        structure = (2 * (uv - m_u * m_v) + c_2) / (uu - m_u**2 + vv - m_v**2 + c_2)
        scores.append((structure * (2 * m_u * m_v + c_1) / (m_u**2 + m_v**2 + c_1)).flatten(1).mean(1))
    return float(torch.cat(scores).mean())
