"""Metrics of a generated table, each beside its floor: the score of real held-out rows."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.errors import UserError
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.marginals import level_codes, shape_errors, trend_error
from sfumato.modalities.table.neighbours import (
    RowEmbedding,
    alpha_precision_beta_recall,
    copy_auc,
    dcr_share,
    fit_embedding,
)
from sfumato.modalities.table.trees import (
    Matrix,
    Predict,
    Trees,
    auc,
    find_trees,
    fit_logistic_regression,
    stratified_folds,
)
from sfumato.registry import nearest

MIN_ROWS = 20  # fewest rows of each set
C2ST_ROWS = 50_000  # rows of each set in classifier two-sample tests
NEIGHBOUR_ROWS = 20_000  # rows of each set in precision and recall
COPY_ROWS = 5_000  # training and held-out rows whose nearest sample is searched for
MAX_COORDINATES = 2**26  # of embedded rows in memory at a time
CHUNK_ROWS = 2**14  # rows that are embedded or hashed at a time
COPIED_SHARE = 1 / 3  # share of the score of actual copies, above which samples look copied
FOLDS = 3  # of cross-validation
MAX_FLOOR_PARTS = 5  # maximum number of parts of the samples whose marginal errors are averaged

FitClassifier = Callable[[Any, NDArray[np.int64]], Predict]


def _subsample(rows: Matrix, count: int, seed: int) -> Matrix:
    """`count` random rows in their order, or all."""
    if count >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])]


def _partition(rows: Matrix, count: int, seed: int) -> list[Matrix]:
    """Random disjoint parts of `count` rows, at most `MAX_FLOOR_PARTS`."""
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = min(MAX_FLOOR_PARTS, len(rows) // count)
    return [rows[np.sort(order[k * count : (k + 1) * count])] for k in range(parts)]


def tree_features(rows: Matrix, columns: Sequence[Column], trees: Trees) -> Matrix:
    """Rows (N, D) with missing categories as a level; the rarest levels are merged if the trees accept fewer."""
    features = rows.copy()
    for k, column in enumerate(columns):
        if column.levels:
            features[:, k] = np.minimum(level_codes(rows[:, k], column), trees.max_levels - 1)
    return features


def _linear_features(rows: Matrix, columns: Sequence[Column]) -> Any:
    """Sparse features (N, P) of rows (N, D): standardised numbers, missing indicators, one-hot categories."""
    from scipy import sparse

    parts: list[Any] = []
    for k, column in enumerate(columns):
        cells, missing = rows[:, k], np.isnan(rows[:, k])
        if column.levels:
            shape = (len(rows), len(column.levels) + 1)
            indices = (np.arange(len(rows)), level_codes(cells, column))
            parts.append(sparse.csr_matrix((np.ones(len(rows)), indices), shape))
        else:
            present = cells[~missing]
            std = (present.std() if present.size else 0) or 1.0
            number = np.where(missing, 0.0, (cells - (present.mean() if present.size else 0)) / std)
            features = [number, missing * 1.0] if missing.any() else [number]
            parts += [sparse.csr_matrix(v[:, None]) for v in features]
    return sparse.hstack(parts, format="csr")


def _cross_validate(x: Any, y: NDArray[np.int64], fit: FitClassifier, seed: int) -> float:
    """2 - 2 max(1/2, AUC) of a classifier of y in {0, 1}, averaged over folds."""
    scores: list[float] = []
    for train, test in stratified_folds(y, FOLDS, seed):
        score = fit(x[train], y[train])(x[test])
        scores.append(2 - 2 * max(0.5, auc(score[y[test] == 1], score[y[test] == 0])))
    return float(np.mean(scores))


def c2st(
    fake: Matrix,
    real: Matrix,
    columns: Sequence[Column],
    *,
    trees: Trees | None = None,
    linear: bool = False,
    seed: int = 0,
) -> float:
    """Classifier two-sample test: 1 if a classifier cannot tell samples from real rows, 0 if it always can.

    2 - 2 max(1/2, AUC), averaged over three folds.

    Args:
        fake: Samples (N, D).
        real: Real rows (M, D).
        columns: The D columns.
        trees: The classifier; default `find_trees()`.
        linear: Use logistic regression in place of trees: it sees the marginals only.
        seed: Seed of the folds.

    References:
        Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv:1610.06545.
    """
    rows = np.concatenate([fake, real])
    y = np.repeat(np.array([1, 0]), [len(fake), len(real)])
    if linear:
        return _cross_validate(_linear_features(rows, columns), y, fit_logistic_regression, seed)
    trees = trees or find_trees()
    categorical = [bool(column.levels) for column in columns]

    def fit(x: Matrix, labels: NDArray[np.int64]) -> Predict:
        model = trees.classifier(categorical, seed).fit(x, labels)
        return lambda x: model.predict_proba(x)[:, 1]

    return _cross_validate(tree_features(rows, columns, trees), y, fit, seed)


def downstream_score(
    train: Matrix, test: Matrix, columns: Sequence[Column], target: int, *, trees: Trees | None = None, seed: int = 0
) -> float:
    """Accuracy on test rows of trees that are trained on other rows to predict the target column.

    For a category the AUC, averaged over its classes (0.5: no skill); for a number the root mean square error in
    standard deviations of the test rows (1: no skill).

    Args:
        train: Training rows (N, D).
        test: Test rows (M, D).
        columns: The D columns.
        target: Index of the column that is predicted from the others.
        trees: The model; default `find_trees()`.
        seed: Seed of the trees.

    References:
        Esteban et al. 2017, Real-valued Medical Time Series Generation, section 4.4 (TSTR), arXiv:1706.02633.
    """
    trees, rest = trees or find_trees(), [k for k in range(len(columns)) if k != target]
    parts = [tree_features(rows[~np.isnan(rows[:, target])], columns, trees) for rows in (train, test)]
    (x, y), (x_test, y_test) = ((part[:, rest], part[:, target]) for part in parts)
    categorical = [bool(columns[k].levels) for k in rest]
    classes, class_index = np.unique(y, return_inverse=True)
    if columns[target].levels:
        if len(classes) < 2:
            return 0.5
        probabilities = trees.classifier(categorical, seed).fit(x, class_index).predict_proba(x_test)
        return _mean_auc(probabilities, classes, y_test)
    if len(classes) < 2:
        return 1.0
    error = trees.regressor(categorical, seed).fit(x, y).predict(x_test) - y_test
    return float(np.sqrt(np.mean(error**2)) / (y_test.std() or 1.0))


def _mean_auc(probabilities: NDArray[Any], classes: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """One-versus-rest AUC of the classes in y, averaged; 0.5 for classes that were not in the training rows."""
    scores: list[float] = []
    for label in np.unique(y):
        column = np.flatnonzero(classes == label)
        own = y == label
        if not own.all():
            scores.append(auc(probabilities[own, column[0]], probabilities[~own, column[0]]) if column.size else 0.5)
    return float(np.mean(scores)) if scores else 0.5


def equal_row_share(fake: Matrix, train: Matrix) -> float:
    """Share of samples (N, D) that equal a training row in every cell."""

    def keys(rows: Matrix) -> Iterator[bytes]:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            canonical = np.where(np.isnan(chunk), np.nan, chunk) + 0.0  # one NaN, one zero
            yield from (row.tobytes() for row in canonical)

    counts = Counter(keys(fake))
    return sum(counts[key] for key in counts.keys() & keys(train)) / len(fake)


def _copy_metrics(fake: Matrix, train: Matrix, held: Matrix, embedding: RowEmbedding, seed: int) -> dict[str, float]:
    """Whether samples are closer to training rows than to held-out rows.

    For the floors, half of the held-out rows are the samples.
    """
    shuffled = held[np.random.default_rng(seed).permutation(len(held))]
    half, rest = np.array_split(shuffled, 2)
    report: dict[str, float] = {}
    limit = max(MIN_ROWS, min(COPY_ROWS, MAX_COORDINATES // embedding.width))
    chunk = max(MIN_ROWS, min(CHUNK_ROWS, MAX_COORDINATES // embedding.width))
    for suffix, samples, new in (("", fake, held), ("_floor", half, rest)):
        train_points, new_points = (embedding(_subsample(rows, limit, seed)) for rows in (train, new))
        count = min(len(train_points), len(new_points))
        sizes = ((samples, 4 * limit), (train, count), (new, count))
        report[f"dcr_share{suffix}"] = dcr_share(*(embedding(_subsample(rows, n, seed)) for rows, n in sizes))
        chunks = (embedding(samples[start : start + chunk]) for start in range(0, len(samples), chunk))
        report[f"copy_auc{suffix}"] = copy_auc(chunks, train_points, new_points)
    return report


def looks_copied(report: Mapping[str, Any]) -> bool:
    r"""Whether the samples of a report look like copies of training rows, by their copy AUC or their equal rows.

    They do if either number exceeds a third of the score of actual copies, and chance by three standard errors. n of N
    rows drawn with replacement cover $c = 1 - e^{-n / N}$ of them, so that their copy AUC is (1 + c) / 2.
    """
    n, n_train, n_held = (int(report[name]) for name in ("n", "n_train", "n_held"))
    covered, (a, b) = 1 - math.exp(-n / n_train), (min(COPY_ROWS, count) for count in (n_train, n_held))
    error = math.sqrt((a + b + 1) / (12 * a * b))  # of an AUC of one half (Mann and Whitney 1947)
    if float(report["copy_auc"]) - 0.5 > max(COPIED_SHARE * covered / 2, 3 * error):
        return True
    equal, floor = float(report["equal_rows"]), float(report["equal_rows_floor"])
    pooled = (equal * n + floor * n_held) / (n + n_held)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n_held))
    return equal - floor > max(COPIED_SHARE * (1 - floor), 3 * error)


def _column_index(columns: Sequence[Column], name: str) -> int:
    names = [column.name for column in columns]
    if name not in names:
        raise UserError(f"target: no column {name!r} in the model; {nearest(name, names)}")
    return names.index(name)


def _check_sets(fake: Matrix, train: Matrix, held: Matrix, columns: Sequence[Column]) -> None:
    for name, rows in (("samples", fake), ("training rows", train), ("held-out rows", held)):
        assert rows.ndim == 2 and rows.shape[1] == len(columns), (name, rows.shape, len(columns))
        if len(rows) < MIN_ROWS:
            raise UserError(f"only {len(rows)} {name}; at least {MIN_ROWS} are needed to compare tables", code=1)


def table_report(
    fake: Matrix,
    train: Matrix,
    held: Matrix,
    columns: Sequence[Column],
    *,
    target: str | None = None,
    trees: Trees | None = None,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """Fidelity, diversity, utility and novelty of a generated table; `name_floor` is the score of real held-out rows.

    `c2st` and `c2st_logistic`: 1 if a classifier cannot tell samples from training rows. `shape_error` and
    `trend_error`: errors of columns and of pairs of columns in percent. `alpha_precision` and `beta_recall`, with as
    many rows of each set. `dcr_share`: share of samples closer to training than to held-out rows; `copy_auc`: AUC of
    telling training from held-out rows by their nearest sample; both 0.5 if nothing is copied. `equal_rows`: share of
    samples that equal a training row. `downstream`: train on samples, predict the target of held-out rows (AUC, or the
    error of a number in standard deviations); its floor trains on as many training rows, `downstream_real` on all.

    For the floors, held-out rows take the place of samples. The errors of columns and pairs are averaged over parts of
    the samples as large as the held-out part: with more rows, a perfect sample would score below the floor.

    Args:
        fake: Generated rows (N, D), rounded to the columns' grids; NaN if missing, categories as level indices.
        train: Training rows (M, D).
        held: Held-out rows (K, D).
        columns: Columns of the table; those that are not modelled are ignored.
        target: Name of the column to predict; None omits `downstream`.
        trees: Classifier and regressor; default `find_trees()`. The report has their name.
        seed: Seed of folds and subsets.

    Raises:
        UserError: A set has fewer than 20 rows, or no column is called `target`.
    """
    columns, trees = [column for column in columns if column.modelled], trees or find_trees()
    _check_sets(fake, train, held, columns)
    j = None if target is None else _column_index(columns, target)
    report: dict[str, float | int | str] = {"n": len(fake), "n_train": len(train), "n_held": len(held)}
    report["trees"] = trees.name
    embedding = fit_embedding(train, columns, by_range=True, weight=1.0)
    limit = max(MIN_ROWS, min(NEIGHBOUR_ROWS, MAX_COORDINATES // embedding.width))
    count = min(limit, len(fake), len(train), len(held))
    train_points = embedding(_subsample(train, count, seed))
    part_rows = min(len(fake), len(held), C2ST_ROWS)
    train_sample = _subsample(train, C2ST_ROWS, seed)
    for suffix, rows in (("", fake), ("_floor", held)):
        sample, parts = _subsample(rows, C2ST_ROWS, seed), _partition(rows, part_rows, seed)
        report[f"c2st{suffix}"] = c2st(sample, train_sample, columns, trees=trees, seed=seed)
        report[f"c2st_logistic{suffix}"] = c2st(sample, train_sample, columns, linear=True, seed=seed)
        shapes = [list(shape_errors(part, train, columns).values()) for part in parts]
        trends = [trend_error(part, train_sample, columns, seed) for part in parts]
        report |= {f"shape_error{suffix}": float(np.mean(shapes)), f"trend_error{suffix}": float(np.mean(trends))}
        precision, recall = alpha_precision_beta_recall(embedding(_subsample(rows, count, seed)), train_points)
        report |= {f"alpha_precision{suffix}": precision, f"beta_recall{suffix}": recall}
        report[f"equal_rows{suffix}"] = equal_row_share(rows, train)
        if j is not None:
            learned = rows if rows is fake else _subsample(train, len(fake), seed)
            report[f"downstream{suffix}"] = downstream_score(learned, held, columns, j, trees=trees, seed=seed)
    if j is not None and len(fake) < len(train):
        report["downstream_real"] = downstream_score(train, held, columns, j, trees=trees, seed=seed)
    standardised = fit_embedding(train, columns, by_range=False, weight=0.5**0.5)
    return report | _copy_metrics(fake, train, held, standardised, seed)
