"""What a table's columns look like one by one and in pairs: the errors of a sample in percent."""

from collections.abc import Sequence
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .trees import Rows

BINS = 10  # into which a number is cut beside a category
DENSE = 2**22  # cells of a contingency table that is counted in full


class Column(Protocol):
    """What a report asks of a column: whether it is one of the D modelled ones, and its levels if it is a category."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> list[str]: ...

    @property
    def modelled(self) -> bool: ...


def codes(values: NDArray[np.float64], column: Column) -> NDArray[np.int64]:
    """Level of each cell (N,); a missing one is a level of its own, after the others."""
    return np.where(np.isnan(values), len(column.levels), np.rint(values)).astype(np.int64)


def kolmogorov(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    r"""The largest difference of two empirical distribution functions, $\sup_x |F_a(x) - F_b(x)|$.

    Missing values count as larger than all others, so that a wrong share of them is seen.
    """
    a, b = np.sort(a), np.sort(b)  # NaN comes last, as one value
    x = np.unique(np.concatenate([a, b]))
    return float(np.abs(np.searchsorted(a, x, "right") / len(a) - np.searchsorted(b, x, "right") / len(b)).max())


def total_variation(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    r"""Half the summed difference of two sets of shares, $\frac{1}{2} \sum_k |p_k - q_k|$, from codes (N,) and (M,)."""
    both = np.concatenate([a, b])
    if both.max() >= DENSE:
        both = np.unique(both, return_inverse=True)[1]
    size = int(both.max()) + 1
    p, q = np.bincount(both[: len(a)], minlength=size) / len(a), np.bincount(both[len(a) :], minlength=size) / len(b)
    return float(np.abs(p - q).sum() / 2)


def shape_errors(fake: Rows, real: Rows, columns: Sequence[Column]) -> dict[str, float]:
    """Error of each column in percent: Kolmogorov-Smirnov distance of numbers, total variation of categories.

    A model of independent columns has none: read it beside the trend error.

    Args:
        fake: Generated rows (N, D).
        real: Real rows (M, D).
        columns: The D columns.
    """
    errors: dict[str, float] = {}
    for k, column in enumerate(columns):
        a, b = fake[:, k], real[:, k]
        distance = total_variation(codes(a, column), codes(b, column)) if column.levels else kolmogorov(a, b)
        errors[column.name] = 100 * distance
    return errors


def _correlation(rows: Rows) -> float:
    """Pearson's correlation of two columns (N, 2) over the rows that have both; 0 where one does not vary."""
    known = rows[~np.isnan(rows).any(1)]
    if len(known) < 2 or not np.ptp(known, 0).all():
        return 0.0
    a, b = (known - known.mean(0)).T
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _binned(values: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each number among ten of equal width over the range of `real`; one below, one above, one missing."""
    known = real[~np.isnan(real)]
    edges = np.histogram_bin_edges(known, BINS) if known.size else np.zeros(1)
    return np.where(np.isnan(values), BINS + 2, np.digitize(values, edges))


def trend_error(fake: Rows, real: Rows, columns: Sequence[Column]) -> float:
    """Mean error over all pairs of columns, in percent; 0 for a table of one column.

    Two numbers: half the difference of their correlations. Otherwise the total variation of the two contingency tables,
    a number being cut into ten bins.

    Args:
        fake: Generated rows (N, D).
        real: Real rows (M, D).
        columns: The D columns.

    References:
        Zhang et al. 2024, Mixed-Type Tabular Data Synthesis with Score-based Diffusion in Latent Space, appendix E.3,
        arXiv:2310.09656.
    """

    def coded(rows: Rows, k: int) -> NDArray[np.int64]:
        return codes(rows[:, k], columns[k]) if columns[k].levels else _binned(rows[:, k], real[:, k])

    a, b = ([coded(rows, k) for k in range(len(columns))] for rows in (fake, real))
    errors: list[float] = []
    for i, j in combinations(range(len(columns)), 2):
        if columns[i].levels or columns[j].levels:
            width = max(int(a[j].max()), int(b[j].max())) + 1
            errors.append(100 * total_variation(a[i] * width + a[j], b[i] * width + b[j]))
        else:
            errors.append(50 * abs(_correlation(fake[:, [i, j]]) - _correlation(real[:, [i, j]])))
    return float(np.mean(errors)) if errors else 0.0
