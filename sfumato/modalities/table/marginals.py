"""Errors of the one- and two-dimensional marginals of a generated table, in percent."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.trees import Matrix

PAIR_BINS = 10  # bins of a number in a contingency table
MAX_PAIRS = 20_000  # maximum number of pairs with a category that are compared
FLAT_VARIANCE = 1e-18  # variance of a column, scaled to a maximum deviation of 1, below which it counts as constant
DENSE_CELLS = 2**22  # cells up to which a contingency table is counted densely


def level_codes(values: NDArray[np.float64], column: Column) -> NDArray[np.int64]:
    """Level of each cell (N,); missing cells are an additional last level."""
    return np.where(np.isnan(values), len(column.levels), np.rint(values)).astype(np.int64)


def ks_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    r"""Kolmogorov-Smirnov distance of two samples, $\sup_x |F_a(x) - F_b(x)|$.

    Missing values count as larger than all others, so that a difference in their share is measured, too.
    """
    a, b = np.sort(a), np.sort(b)  # NaN comes last, as one value
    x = np.unique(np.concatenate([a, b]))
    return float(np.abs(np.searchsorted(a, x, "right") / len(a) - np.searchsorted(b, x, "right") / len(b)).max())


def total_variation(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    r"""Total variation distance of the distributions of codes (N,) and (M,), $\frac{1}{2} \sum_k |p_k - q_k|$."""
    both = np.concatenate([a, b])
    if both.max() >= DENSE_CELLS:
        both = np.unique(both, return_inverse=True)[1]
    size = int(both.max()) + 1
    p, q = np.bincount(both[: len(a)], minlength=size) / len(a), np.bincount(both[len(a) :], minlength=size) / len(b)
    return float(np.abs(p - q).sum() / 2)


def shape_errors(fake: Matrix, real: Matrix, columns: Sequence[Column]) -> dict[str, float]:
    """Error of each column in percent: Kolmogorov-Smirnov distance of numbers, total variation of categories.

    Independent columns can have none: read it beside the trend error.

    Args:
        fake: Generated rows (N, D).
        real: Real rows (M, D).
        columns: The D columns.
    """
    errors: dict[str, float] = {}
    for k, column in enumerate(columns):
        a, b = fake[:, k], real[:, k]
        if column.levels:
            errors[column.name] = 100 * total_variation(level_codes(a, column), level_codes(b, column))
        else:
            errors[column.name] = 100 * ks_distance(a, b)
    return errors


def correlations(rows: Matrix) -> NDArray[np.float64]:
    """Pearson correlation (D, D) of the columns of (N, D), over the rows that have both; 0 if one is constant."""
    present = ~np.isnan(rows)
    count = np.maximum(present.sum(0), 1)
    x = np.where(present, rows, 0.0)
    x = np.where(present, x - x.sum(0) / count, 0.0)
    scale = np.abs(x).max(0, initial=0.0)
    x, mask = x / np.where(scale > 0, scale, 1.0), present.astype(np.float64)
    n = np.maximum(mask.T @ mask, 1)
    mean = x.T @ mask / n  # (D, D): mean of column i over the rows that have column j
    covariance = x.T @ x / n - mean * mean.T
    variance = (x**2).T @ mask / n - mean**2
    variance = np.where(variance > FLAT_VARIANCE, variance, 0.0)
    product = np.sqrt(variance * variance.T)
    return np.divide(covariance, product, out=np.zeros_like(covariance), where=product > 0)


def _bins(values: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.int64]:
    """Bin of each number, of ten with equal width over the range of `real`; one below, one above, one missing."""
    present = real[~np.isnan(real)]
    edges = np.histogram_bin_edges(present, PAIR_BINS) if present.size else np.zeros(1)
    return np.where(np.isnan(values), PAIR_BINS + 2, np.digitize(values, edges))


def trend_error(fake: Matrix, real: Matrix, columns: Sequence[Column], seed: int = 0) -> float:
    """Mean error of all pairs of columns in percent; 0 for a table of one column.

    Two numbers: half the difference of their correlations. Other pairs: the total variation of the two contingency
    tables, with numbers in ten bins; of more than 20,000 such pairs, a random sample.

    Args:
        fake: Generated rows (N, D).
        real: Real rows (M, D).
        columns: The D columns.
        seed: Seed of the sample of pairs.

    References:
        Zhang et al. 2024, Mixed-Type Tabular Data Synthesis with Score-based Diffusion in Latent Space, appendix E.3,
        arXiv:2310.09656.
    """
    categorical = np.array([bool(column.levels) for column in columns])
    first, second = np.triu_indices(len(columns), 1)
    if not len(first):
        return 0.0
    differences = np.abs(correlations(fake[:, ~categorical]) - correlations(real[:, ~categorical]))
    total = 50 * float(differences[np.triu_indices(len(differences), 1)].sum())
    mixed = categorical[first] | categorical[second]
    pairs = np.stack([first[mixed], second[mixed]], 1)
    if len(pairs):
        sample = pairs[np.random.default_rng(seed).permutation(len(pairs))[:MAX_PAIRS]]
        total += 100 * _contingency_error(fake, real, columns, sample) * len(pairs)
    return total / len(first)


def _contingency_error(fake: Matrix, real: Matrix, columns: Sequence[Column], pairs: NDArray[np.int64]) -> float:
    """Mean total variation of the contingency tables of pairs (P, 2) of columns."""

    def codes(rows: Matrix, k: int) -> NDArray[np.int64]:
        return level_codes(rows[:, k], columns[k]) if columns[k].levels else _bins(rows[:, k], real[:, k])

    used = np.unique(pairs)
    a, b = ({k: codes(rows, k) for k in used} for rows in (fake, real))
    widths = {k: max(int(a[k].max()), int(b[k].max())) + 1 for k in used}
    errors = [total_variation(a[i] * widths[j] + a[j], b[i] * widths[j] + b[j]) for i, j in pairs]
    return float(np.mean(errors))
