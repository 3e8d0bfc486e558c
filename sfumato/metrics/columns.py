"""What a table's columns look like one by one and in pairs: the errors of a sample in percent."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .trees import Rows

BINS = 10  # into which a number is cut beside a category
MOST_PAIRS = 20_000  # with a category, that are looked at
FLAT = 1e-18  # variance, in squares of the largest deviation, of a column that does not vary
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


def correlations(rows: Rows) -> NDArray[np.float64]:
    """Pearson's correlation of each two columns of (N, D) over the rows that have both: (D, D); 0 where one is flat."""
    known = ~np.isnan(rows)
    count = np.maximum(known.sum(0), 1)
    x = np.where(known, rows, 0.0)
    x = np.where(known, x - x.sum(0) / count, 0.0)
    scale = np.abs(x).max(0, initial=0.0)
    x, mask = x / np.where(scale > 0, scale, 1.0), known.astype(np.float64)
    n = np.maximum(mask.T @ mask, 1)
    mean = x.T @ mask / n  # (D, D): of the first column where there is the second one
    both = x.T @ x / n - mean * mean.T
    spread = (x**2).T @ mask / n - mean**2
    spread = np.where(spread > FLAT, spread, 0.0)
    product = np.sqrt(spread * spread.T)
    return np.divide(both, product, out=np.zeros_like(both), where=product > 0)


def _binned(values: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each number among ten of equal width over the range of `real`; one below, one above, one missing."""
    known = real[~np.isnan(real)]
    edges = np.histogram_bin_edges(known, BINS) if known.size else np.zeros(1)
    return np.where(np.isnan(values), BINS + 2, np.digitize(values, edges))


def trend_error(fake: Rows, real: Rows, columns: Sequence[Column], seed: int = 0) -> float:
    """Mean error over all pairs of columns, in percent; 0 for a table of one column.

    Two numbers: half the difference of their correlations. Otherwise the total variation of the two contingency tables,
    a number being cut into ten bins; of more than 20,000 such pairs so many are drawn.

    Args:
        fake: Generated rows (N, D).
        real: Real rows (M, D).
        columns: The D columns.
        seed: Of the pairs that are drawn.

    References:
        Zhang et al. 2024, Mixed-Type Tabular Data Synthesis with Score-based Diffusion in Latent Space, appendix E.3,
        arXiv:2310.09656.
    """

    def coded(rows: Rows, k: int) -> NDArray[np.int64]:
        return codes(rows[:, k], columns[k]) if columns[k].levels else _binned(rows[:, k], real[:, k])

    kinds = np.array([bool(column.levels) for column in columns])
    first, second = np.triu_indices(len(columns), 1)
    if not len(first):
        return 0.0
    counted = kinds[first] | kinds[second]
    apart = np.abs(correlations(fake[:, ~kinds]) - correlations(real[:, ~kinds]))
    total = 50 * float(apart[np.triu_indices(len(apart), 1)].sum())
    pairs = np.stack([first[counted], second[counted]], 1)
    if len(pairs):
        some = np.random.default_rng(seed).permutation(len(pairs))[:MOST_PAIRS]
        needed = np.unique(pairs[some])
        a, b = ({k: coded(rows, k) for k in needed} for rows in (fake, real))
        widths = {k: max(int(a[k].max()), int(b[k].max())) + 1 for k in needed}
        errors = [total_variation(a[i] * widths[j] + a[j], b[i] * widths[j] + b[j]) for i, j in pairs[some]]
        total += 100 * float(np.mean(errors)) * len(pairs)
    return total / len(first)
