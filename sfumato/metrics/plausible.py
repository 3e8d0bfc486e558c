"""Which made rows a classifier of the real ones finds as plausible in their class as real rows are."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .columns import Column
from .table import FOLDS, tree_features
from .trees import Rows, Trees, find_trees, folds

SHARE = 0.05  # of the real rows of a class, the least plausible: made ones below them are refused

Chances = Callable[[Rows, Rows], NDArray[np.float64]]  # features (N, P) and classes (N,) -> how likely each class is


def _learned(trees: Trees, categorical: Sequence[bool], x: Rows, y: Rows, seed: int) -> Chances:
    """How likely classes (N,) are, by trees that learn on features x (N, P) and y (N,); 0 for a class not in y."""
    classes, numbered = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        return lambda asked, labels: (labels == classes[0]).astype(np.float64)
    model = trees.classes(categorical, seed).fit(x, numbered)

    def chances(asked: Rows, labels: Rows) -> NDArray[np.float64]:
        found = np.hstack([model.predict_proba(asked), np.zeros((len(asked), 1))])  # the last: no such class
        place = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
        return found[np.arange(len(asked)), np.where(classes[place] == labels, place, len(classes))]

    return chances


def plausible(
    real: Rows, columns: Sequence[Column], target: int, *, trees: Trees | None = None, seed: int = 0
) -> Callable[[Rows], NDArray[np.bool_]]:
    """What tells which rows (N, D) show their class: those that trees find as likely of it as they find real rows.

    The measure is taken on real rows that the trees have not learned (three folds); made ones that are less likely
    than all but a twentieth of their class are refused. A class with fewer rows than folds refuses none.

    Args:
        real: Rows to learn on (M, D).
        columns: The D columns.
        target: Which of them is the class.
        trees: What learns; default `find_trees()`.
        seed: Seed of trees and folds.
    """
    trees = trees or find_trees()
    rest = [k for k in range(len(columns)) if k != target]
    categorical = [bool(columns[k].levels) for k in rest]

    def features(rows: Rows) -> Rows:
        return tree_features(rows, columns, trees)[:, rest]

    known = real[~np.isnan(real[:, target])]
    x, y = features(known), known[:, target]
    chance = np.zeros(len(y))
    for learned, asked in folds(y.astype(np.int64), FOLDS, seed):
        chance[asked] = _learned(trees, categorical, x[learned], y[learned], seed)(x[asked], y[asked])
    many = [label for label in np.unique(y) if (y == label).sum() >= FOLDS]
    least = {label: float(np.quantile(chance[y == label], SHARE)) for label in many}
    of_all = _learned(trees, categorical, x, y, seed)

    def shown(rows: Rows) -> NDArray[np.bool_]:
        wanted = np.array([least.get(label, 0.0) for label in rows[:, target]])
        return of_all(features(rows), rows[:, target]) >= wanted

    return shown
