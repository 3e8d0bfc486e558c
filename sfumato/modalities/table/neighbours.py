"""Rows of a table as vectors: precision and recall, and whether samples are copies of training rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.metrics.distances import nearest_neighbours
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.marginals import level_codes
from sfumato.modalities.table.trees import Matrix, auc

MAX_ONE_HOT = 100  # levels of a column with a coordinate of their own; the rarer ones share one
CALIBRATION_LEVELS = 30  # values of alpha and beta at which precision and recall are evaluated


@dataclass(frozen=True)
class RowEmbedding:
    """Numbers divided by their scale, categories one-hot; missing numbers are the median, plus an indicator.

    Args:
        columns: The D columns.
        median: Median of each number in the training rows (D,).
        scale: Divisor of each number (D,).
        has_missing: Which columns have missing cells (D,).
        weight: Length of the one-hot vectors: two levels are weight * sqrt(2) apart.
    """

    columns: Sequence[Column]
    median: NDArray[np.float64]
    scale: NDArray[np.float64]
    has_missing: NDArray[np.bool_]
    weight: float

    @property
    def width(self) -> int:
        """Number of coordinates P."""
        pairs = zip(self.columns, self.has_missing, strict=True)
        return sum(min(len(c.levels), MAX_ONE_HOT) + 1 if c.levels else 1 + int(missing) for c, missing in pairs)

    def __call__(self, rows: Matrix) -> Tensor:
        """Embeddings (N, P), float64, of rows (N, D)."""
        parts: list[NDArray[np.float64]] = []
        for k, column in enumerate(self.columns):
            cells = rows[:, k]
            if column.levels:
                level = np.minimum(level_codes(cells, column), MAX_ONE_HOT)
                parts.append(self.weight * (level[:, None] == np.arange(min(len(column.levels), MAX_ONE_HOT) + 1)))
                continue
            missing = np.isnan(cells)
            parts.append((np.where(missing, self.median[k], cells) / self.scale[k])[:, None])
            if self.has_missing[k]:
                parts.append(self.weight * missing[:, None])
        return torch.from_numpy(np.hstack(parts))


def fit_embedding(train: Matrix, columns: Sequence[Column], by_range: bool, weight: float) -> RowEmbedding:
    """An embedding in which each number has unit range, or unit standard deviation, over training rows (N, D)."""
    median, scale = np.zeros(len(columns)), np.ones(len(columns))
    for k, column in enumerate(columns):
        present = train[~np.isnan(train[:, k]), k]
        if not column.levels and present.size:
            median[k], width = np.median(present), np.ptp(present) if by_range else present.std()
            scale[k] = width if width > 0 else 1.0
    return RowEmbedding(columns, median, scale, np.isnan(train.min(0)), weight)


def _calibration(shares: Tensor, levels: Tensor) -> float:
    r"""Agreement of shares (K,) with their nominal levels (K,), $1 - 2 \int |share - level|$."""
    return float(1 - (shares - levels).abs().sum() / levels.sum())


def _within(distances: Tensor, radii: Tensor) -> Tensor:
    """Which distances (N,) are at most each radius (K,): (K, N)."""
    return distances[None] <= radii[:, None]


def alpha_precision_beta_recall(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """Integrated alpha-precision and beta-recall: about 1 and 0.5 for samples of the same distribution.

    Precision: whether the ball around the real mean with a share alpha of the real points has the same share of the
    samples. Recall: share of real points whose nearest sample is as near as their nearest real point, and among the
    central share beta of these samples.

    Args:
        fake: Embeddings of samples (N, P).
        real: Embeddings of real rows (M, P), best with M = N.

    References:
        Alaa et al. 2022, How Faithful is your Synthetic Data?, arXiv:2102.08921, section 3.
    """
    levels = torch.linspace(0, 1, CALIBRATION_LEVELS, dtype=real.dtype)
    radii = torch.quantile((real - real.mean(0)).norm(dim=1), levels)
    precision = _within((fake - real.mean(0)).norm(dim=1), radii).double().mean(1)
    distance, index = nearest_neighbours(real, fake)
    central = (fake[index] - fake.mean(0)).norm(dim=1)
    covered = (distance <= nearest_neighbours(real)[0]) & _within(central, torch.quantile(central, levels))
    return _calibration(precision, levels), _calibration(covered.double().mean(1), levels)


def dcr_share(fake: Tensor, train: Tensor, held: Tensor) -> float:
    """Share of samples (N, P) closer to training points (M, P) than to as many held-out ones (M, P).

    0.5 if nothing is copied. DCR is the distance to the closest record.

    References:
        Platzer and Reutterer 2021, Holdout-Based Empirical Assessment of Mixed-Type Synthetic Data, arXiv:2104.00635.
    """
    assert len(train) == len(held), (len(train), len(held))
    to_train, to_held = nearest_neighbours(fake, train)[0], nearest_neighbours(fake, held)[0]
    return float((to_train < to_held).double().mean() + (to_train == to_held).double().mean() / 2)


def copy_auc(fake: Iterable[Tensor], train: Tensor, held: Tensor) -> float:
    """AUC of a membership test: training against held-out points by the distance to their nearest sample.

    0.5 if nothing is copied; about 0.8 if the samples are training rows, drawn with replacement.

    Args:
        fake: Embeddings of all samples, in parts (N, P).
        train: Training points (M, P).
        held: Held-out points (K, P).
    """
    points = torch.cat([train, held])
    distance = torch.full((len(points),), torch.inf, dtype=points.dtype)
    for part in fake:
        distance = torch.minimum(distance, nearest_neighbours(points, part)[0])
    return auc(-distance[: len(train)].numpy(), -distance[len(train) :].numpy())
