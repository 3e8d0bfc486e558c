"""Labels generated rows by their target column, and rejects implausible ones."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.errors import UserError
from sfumato.metrics import NearDuplicates, random_indices
from sfumato.metrics.duplicates import DISTANCE_SAMPLE
from sfumato.modalities.base import report_stage
from sfumato.modalities.table.columns import Column, modelled, round_values, target_index
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.metrics import FOLDS, tree_features
from sfumato.modalities.table.neighbours import fit_embedding
from sfumato.modalities.table.trees import Matrix, Trees, find_trees, stratified_folds
from sfumato.types import UNKNOWN, Items, Progress

IMPLAUSIBLE_SHARE = 0.05  # quantile of the real rows' class probability below which generated rows are rejected

RowFilter = Callable[[Matrix], NDArray[np.bool_]]  # rows (N, D) -> which are accepted (N,)
ClassProbability = Callable[[Matrix, Matrix], NDArray[np.float64]]  # (features (N, P), classes (N,)) -> p(y | x) (N,)


def _fit_probability(trees: Trees, categorical: Sequence[bool], x: Matrix, y: Matrix, seed: int) -> ClassProbability:
    """Class probability p(y | x) of trees trained on features x (N, P) and y (N,); 0 for a class not in y."""
    classes, class_index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        return lambda x, labels: (labels == classes[0]).astype(np.float64)
    model = trees.classifier(categorical, seed).fit(x, class_index)

    def probability(x: Matrix, labels: Matrix) -> NDArray[np.float64]:
        probabilities = np.hstack([model.predict_proba(x), np.zeros((len(x), 1))])  # last column: unknown class
        index = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
        return probabilities[np.arange(len(x)), np.where(classes[index] == labels, index, len(classes))]

    return probability


def fit_plausibility(
    real: Matrix, columns: Sequence[Column], target: int, *, trees: Trees | None = None, seed: int = 0
) -> RowFilter:
    """A filter of plausible rows: those whose class is as probable, given the other cells, as for real rows.

    The threshold is measured on real rows by three-fold cross-validation: rows with a lower probability than all but a
    twentieth of their class are implausible. A class with fewer rows than folds has no threshold.

    Args:
        real: Training rows (M, D).
        columns: The D columns.
        target: Index of the class column.
        trees: The classifier; default `find_trees()`.
        seed: Seed of trees and folds.
    """
    trees = trees or find_trees()
    rest = [k for k in range(len(columns)) if k != target]
    categorical = [bool(columns[k].levels) for k in rest]

    def features(rows: Matrix) -> Matrix:
        return tree_features(rows, columns, trees)[:, rest]

    labelled = real[~np.isnan(real[:, target])]
    x, y = features(labelled), labelled[:, target]
    held_out_probability = np.zeros(len(y))
    for train, test in stratified_folds(y.astype(np.int64), FOLDS, seed):
        probability = _fit_probability(trees, categorical, x[train], y[train], seed)
        held_out_probability[test] = probability(x[test], y[test])
    thresholds = {
        label: float(np.quantile(held_out_probability[y == label], IMPLAUSIBLE_SHARE))
        for label in np.unique(y)
        if (y == label).sum() >= FOLDS
    }
    class_probability = _fit_probability(trees, categorical, x, y, seed)

    def is_plausible(rows: Matrix) -> NDArray[np.bool_]:
        threshold = np.array([thresholds.get(label, 0.0) for label in rows[:, target]])
        return class_probability(features(rows), rows[:, target]) >= threshold

    return is_plausible


class TableLabeler:
    """Labels generated rows by their target column; rows that trees find implausible have no class.

    Args:
        given: The given rows.
        unlabelled: Must be empty: the class of a row is one of its cells.
        names: Not used: the classes are the target column's levels.
        target_column: Name of the target column; default the last modelled one.
        device: Not used.
        progress: Called as progress(stage, done, total).

    Raises:
        UserError: There are unlabelled items, or the target is not a category.
    """

    conditional = False

    def __init__(
        self,
        given: TableDataset,
        unlabelled: Sequence[TableDataset],
        names: Sequence[str],
        target_column: str | None = None,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if unlabelled:
            raise UserError("--unlabelled: is for images; leave the target cells of a table's rows empty instead")
        self.columns, self.values, self.progress = modelled(given.columns), given.values, progress
        self.target = target_index(target_column, self.columns)
        name = self.columns[self.target].name
        self.names = self.columns[self.target].levels
        if not self.names:
            advice = "choose a category with --target, or train with --categorical"
            raise UserError(f"--target {name}: the column holds numbers, not classes; {advice}")
        self.labels = self.class_numbers(self.values)

    def class_numbers(self, rows: NDArray[np.float64]) -> Tensor:
        """The class number (N,) of each row (N, D), `UNKNOWN` for a missing cell."""
        cells = rows[:, self.target]
        return torch.from_numpy(np.where(np.isnan(cells), UNKNOWN, cells).astype(np.int64))

    @cached_property
    def is_plausible(self) -> RowFilter:
        """Filter of rows that are plausible for their class."""
        with report_stage(self.progress, "train the labeler"):
            return fit_plausibility(self.values, self.columns, self.target)

    def predict(self, items: Items) -> Tensor:
        """The class number (N,) of each row, `UNKNOWN` if implausible."""
        rows = round_values(self.columns, items.stack().numpy().astype(np.float64))
        return torch.where(torch.from_numpy(self.is_plausible(rows)), self.class_numbers(rows), UNKNOWN)

    def pseudo_label(self, items: Items) -> Tensor:
        """`UNKNOWN` (N,) for all rows: a missing class is a missing cell, which `inpaint` imputes."""
        return torch.full((len(items),), UNKNOWN)

    @cached_property
    def embedding(self) -> Callable[[NDArray[np.float64]], Tensor]:
        """Embedding of rows (N, D) as vectors (N, P)."""
        return fit_embedding(self.values, self.columns, by_range=False, weight=0.5**0.5)

    def embed(self, items: Items) -> Tensor:
        """Embeddings (N, P) of rows."""
        return self.embedding(round_values(self.columns, items.stack().numpy().astype(np.float64)))

    @cached_property
    def duplicates(self) -> NearDuplicates:
        """Finds near-duplicates of given and of generated rows."""
        real = self.embedding(self.values)
        return NearDuplicates(lambda: [real], real[random_indices(len(real), DISTANCE_SAMPLE)])
