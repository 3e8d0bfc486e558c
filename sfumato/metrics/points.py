"""Rows of a table as points: are samples where the real rows are, everywhere they are, and not on top of them?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .columns import Column, codes
from .distances import neighbours
from .trees import Rows, auc

MOST_LEVELS = 100  # rarer levels of a column lie at one point
GRID = 30  # radii at which precision and recall are looked at


@dataclass(frozen=True)
class Space:
    """Numbers divided by their spread, categories as unit vectors; missing numbers at the median, and marked.

    Args:
        columns: The D columns.
        middle: Median of each number in the training rows (D,).
        spread: What each number is divided by (D,).
        gaps: Which columns have missing numbers (D,).
        weight: Length of the vectors of categories: two levels lie weight * sqrt(2) apart.
    """

    columns: Sequence[Column]
    middle: NDArray[np.float64]
    spread: NDArray[np.float64]
    gaps: NDArray[np.bool_]
    weight: float

    @property
    def width(self) -> int:
        """P, how many coordinates a point has."""
        kinds = zip(self.columns, self.gaps, strict=True)
        return sum(min(len(c.levels), MOST_LEVELS) + 1 if c.levels else 1 + int(gaps) for c, gaps in kinds)

    def __call__(self, rows: Rows) -> Tensor:
        """Rows (N, D) as points (N, P), float64."""
        parts: list[NDArray[np.float64]] = []
        for k, column in enumerate(self.columns):
            cells = rows[:, k]
            if column.levels:
                level = np.minimum(codes(cells, column), MOST_LEVELS)
                parts.append(self.weight * (level[:, None] == np.arange(min(len(column.levels), MOST_LEVELS) + 1)))
                continue
            blank = np.isnan(cells)
            parts.append((np.where(blank, self.middle[k], cells) / self.spread[k])[:, None])
            if self.gaps[k]:
                parts.append(self.weight * blank[:, None])
        return torch.from_numpy(np.hstack(parts))


def measured_space(train: Rows, columns: Sequence[Column], by_range: bool, weight: float) -> Space:
    """A space in which each number has unit range, or unit standard deviation, over the training rows (N, D)."""
    middle, spread = np.zeros(len(columns)), np.ones(len(columns))
    for k, column in enumerate(columns):
        known = train[~np.isnan(train[:, k]), k]
        if not column.levels and known.size:
            middle[k], width = np.median(known), np.ptp(known) if by_range else known.std()
            spread[k] = width if width > 0 else 1.0
    return Space(columns, middle, spread, np.isnan(train.min(0)), weight)


def _calibration(shares: Tensor, levels: Tensor) -> float:
    r"""How close shares come to the levels they should have, $1 - 2 \int |share - level|$, on a grid of levels (K,)."""
    return float(1 - (shares - levels).abs().sum() / levels.sum())


def _within(distances: Tensor, radii: Tensor) -> Tensor:
    """Which distances (N,) are at most each radius (K,): (K, N)."""
    return distances[None] <= radii[:, None]


def precision_and_recall(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """Integrated alpha-precision and beta-recall: about 1 and 0.5 for samples of the same distribution.

    Precision: of the balls around the real mean that hold a share alpha of the real points, do samples fill the same
    share? Recall: is a real point's nearest sample as near as its nearest real one, and within the central share beta
    of such samples?

    Args:
        fake: Samples (N, P).
        real: Real points (M, P), best as many.

    References:
        Alaa et al. 2022, How Faithful is your Synthetic Data?, arXiv:2102.08921, section 3.
    """
    levels = torch.linspace(0, 1, GRID, dtype=real.dtype)
    radii = torch.quantile((real - real.mean(0)).norm(dim=1), levels)
    precision = _within((fake - real.mean(0)).norm(dim=1), radii).double().mean(1)
    far, which = neighbours(real, fake)
    central = (fake[which] - fake.mean(0)).norm(dim=1)
    covered = (far <= neighbours(real)[0]) & _within(central, torch.quantile(central, levels))
    return _calibration(precision, levels), _calibration(covered.double().mean(1), levels)


def closer_share(fake: Tensor, train: Tensor, held: Tensor) -> float:
    """Share of samples (N, P) nearer to the training points than to as many held-out ones; 0.5 where neither is copied.

    References:
        Platzer and Reutterer 2021, Holdout-Based Empirical Assessment of Mixed-Type Synthetic Data, arXiv:2104.00635.
    """
    assert len(train) == len(held), (len(train), len(held))
    to_train, to_held = neighbours(fake, train)[0], neighbours(fake, held)[0]
    return float((to_train < to_held).double().mean() + (to_train == to_held).double().mean() / 2)


def copy_auc(fake: Iterable[Tensor], train: Tensor, held: Tensor) -> float:
    """How well the distance to the nearest sample tells training points from held-out ones, as an AUC.

    0.5 where nothing is copied; about 0.8 where the samples are training rows, drawn with replacement.

    Args:
        fake: All samples, in pieces (N, P).
        train: Training points (M, P).
        held: Held-out points (K, P).
    """
    both = torch.cat([train, held])
    far = torch.full((len(both),), torch.inf, dtype=both.dtype)
    for piece in fake:
        far = torch.minimum(far, neighbours(both, piece)[0])
    return auc(-far[: len(train)].numpy(), -far[len(train) :].numpy())
