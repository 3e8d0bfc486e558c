"""The report about generated tables: every number beside what real held-out rows score."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.choice import nearest
from sfumato.errors import UserError
from sfumato.metrics.columns import Column, codes, shape_errors, trend_error
from sfumato.metrics.points import Space, closer_share, copy_auc, measured_space, precision_and_recall
from sfumato.metrics.trees import Rows, Trees, auc, find_trees, fit_linear, folds

FEWEST = 20  # rows of each set
DETECTED = 50_000  # rows of each set that classifiers see
NEIGHBOURS = 20_000  # rows of each set in precision, recall and the share nearer to training rows
CHECKED = 5_000  # training and held-out rows whose nearest sample is looked for
NUMBERS = 2**26  # coordinates of points held at a time
COPIED = 1 / 3  # of what a copy of training rows would score: more, and the samples look copied
FOLDS = 3
PARTS = 5  # of the samples that are measured by themselves, at most
PIECE = 2**14  # rows handled at a time

Classifier = Callable[[Any, NDArray[np.int64]], Callable[[Any], NDArray[np.float64]]]


def _some(rows: Rows, count: int, seed: int) -> Rows:
    """`count` of the rows at random, or all."""
    if count >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])]


def _dealt(rows: Rows, count: int, seed: int) -> list[Rows]:
    """Some parts of `count` different rows each."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[np.sort(order[k * count : (k + 1) * count])] for k in range(min(PARTS, len(rows) // count))]


def tree_features(rows: Rows, columns: Sequence[Column], trees: Trees) -> Rows:
    """Rows (N, D) with a missing category as a level of its own; the rarest levels as one, if there are too many."""
    plain = rows.copy()
    for k, column in enumerate(columns):
        if column.levels:
            plain[:, k] = np.minimum(codes(rows[:, k], column), trees.levels - 1)
    return plain


def _linear_features(rows: Rows, columns: Sequence[Column]) -> Any:
    """Rows (N, D) as a sparse matrix (N, P): standardised numbers, marks of the missing ones, one-hot categories."""
    from scipy import sparse

    parts: list[Any] = []
    for k, column in enumerate(columns):
        cells, blank = rows[:, k], np.isnan(rows[:, k])
        if column.levels:
            level, every = codes(cells, column), np.arange(len(rows))
            shape = (len(rows), len(column.levels) + 1)
            parts.append(sparse.csr_matrix((np.ones(len(rows)), (every, level)), shape))
        else:
            known = cells[~blank]
            spread = (known.std() if known.size else 0) or 1.0
            number = np.where(blank, 0.0, (cells - (known.mean() if known.size else 0)) / spread)
            parts += [sparse.csr_matrix(v[:, None]) for v in ([number, blank * 1.0] if blank.any() else [number])]
    return sparse.hstack(parts, format="csr")


def _detect(x: Any, y: NDArray[np.int64], fit: Classifier, seed: int) -> float:
    """2 - 2 max(1/2, AUC), the mean over folds, of a classifier that tells y = 1 from y = 0 by x."""
    scores: list[float] = []
    for known, asked in folds(y, FOLDS, seed):
        found = fit(x[known], y[known])(x[asked])
        scores.append(2 - 2 * max(0.5, auc(found[y[asked] == 1], found[y[asked] == 0])))
    return float(np.mean(scores))


def c2st(
    fake: Rows,
    real: Rows,
    columns: Sequence[Column],
    *,
    trees: Trees | None = None,
    linear: bool = False,
    seed: int = 0,
) -> float:
    """Classifier two-sample test: 1 if a classifier cannot tell samples from real rows, 0 if it always can.

    2 - 2 max(1/2, AUC), a mean over three folds.

    Args:
        fake: Samples (N, D).
        real: Real rows (M, D).
        columns: The D columns.
        trees: The classifier; default `find_trees()`.
        linear: Take logistic regression in place of trees: it sees the margins only.
        seed: Seed of the folds.

    References:
        Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv:1610.06545.
    """
    both = np.concatenate([fake, real])
    y = np.repeat(np.array([1, 0]), [len(fake), len(real)])
    if linear:
        return _detect(_linear_features(both, columns), y, fit_linear, seed)
    trees = trees or find_trees()
    categorical = [bool(column.levels) for column in columns]

    def fit(x: Rows, labels: NDArray[np.int64]) -> Callable[[Rows], NDArray[np.float64]]:
        model = trees.classes(categorical, seed).fit(x, labels)
        return lambda asked: model.predict_proba(asked)[:, 1]

    return _detect(tree_features(both, columns, trees), y, fit, seed)


def downstream(
    train: Rows, test: Rows, columns: Sequence[Column], target: int, *, trees: Trees | None = None, seed: int = 0
) -> float:
    """How well trees that learn on some rows predict the target column of others.

    The AUC of a category, averaged over its classes (0.5: no skill). The root mean square error of a number, in
    standard deviations of the test rows (1: no skill).

    Args:
        train: Rows to learn on (N, D).
        test: Rows to predict (M, D).
        columns: The D columns.
        target: Which of them is predicted from the others.
        trees: What learns; default `find_trees()`.
        seed: Seed of the trees.

    References:
        Esteban et al. 2017, Real-valued Medical Time Series Generation, section 4.4 (TSTR), arXiv:1706.02633.
    """
    trees, rest = trees or find_trees(), [k for k in range(len(columns)) if k != target]
    parts = [tree_features(rows[~np.isnan(rows[:, target])], columns, trees) for rows in (train, test)]
    (x, y), (asked, truth) = ((part[:, rest], part[:, target]) for part in parts)
    categorical = [bool(columns[k].levels) for k in rest]
    classes, numbered = np.unique(y, return_inverse=True)
    if columns[target].levels:
        if len(classes) < 2:
            return 0.5
        chances = trees.classes(categorical, seed).fit(x, numbered).predict_proba(asked)
        return _mean_auc(chances, classes, truth)
    if len(classes) < 2:
        return 1.0
    error = trees.number(categorical, seed).fit(x, y).predict(asked) - truth
    return float(np.sqrt(np.mean(error**2)) / (truth.std() or 1.0))


def _mean_auc(chances: NDArray[Any], classes: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """The AUC of each class of the test rows against the others, averaged; 0.5 for classes not learned."""
    scores: list[float] = []
    for label in np.unique(truth):
        column = np.flatnonzero(classes == label)
        own = truth == label
        if not own.all():
            scores.append(auc(chances[own, column[0]], chances[~own, column[0]]) if column.size else 0.5)
    return float(np.mean(scores)) if scores else 0.5


def equal_share(fake: Rows, train: Rows) -> float:
    """Share of samples (N, D) that equal a training row in every cell."""

    def keys(rows: Rows) -> Iterator[bytes]:
        for start in range(0, len(rows), PIECE):
            part = rows[start : start + PIECE]
            plain = np.where(np.isnan(part), np.nan, part) + 0.0  # one NaN, one zero
            yield from (row.tobytes() for row in plain)

    wanted = Counter(keys(fake))
    found = wanted.keys() & keys(train)
    return sum(wanted[key] for key in found) / len(fake)


def _copying(fake: Rows, train: Rows, held: Rows, space: Space, seed: int) -> dict[str, float]:
    """Are samples nearer to training rows than to new ones? The floors take half of the held-out rows as samples."""
    mixed = held[np.random.default_rng(seed).permutation(len(held))]
    half, rest = np.array_split(mixed, 2)
    report: dict[str, float] = {}
    most = max(FEWEST, min(CHECKED, NUMBERS // space.width))
    piece = max(FEWEST, min(PIECE, NUMBERS // space.width))
    for suffix, made, new in (("", fake, held), ("_floor", half, rest)):
        seen, unseen = space(_some(train, most, seed)), space(_some(new, most, seed))
        few = min(len(seen), len(unseen))
        some, *real = (space(_some(rows, n, seed)) for rows, n in ((made, 4 * most), (train, few), (new, few)))
        report[f"dcr_share{suffix}"] = closer_share(some, *real)
        pieces = (space(made[start : start + piece]) for start in range(0, len(made), piece))
        report[f"copy_auc{suffix}"] = copy_auc(pieces, seen, unseen)
    return report


def looks_copied(report: Mapping[str, Any]) -> bool:
    r"""Whether the rows of a report look like training rows: by how near they come to these, or by being equal to them.

    A third of what a copy of training rows would score is too much. n of N rows drawn with replacement touch
    $c = 1 - e^{-n / N}$ of them, so that their copy AUC is (1 + c) / 2. Either number has to be beyond chance, three
    standard errors.
    """
    made, seen, new = (int(report[name]) for name in ("n", "n_train", "n_held"))
    touched, (a, b) = 1 - math.exp(-made / seen), (min(CHECKED, n) for n in (seen, new))
    error = math.sqrt((a + b + 1) / (12 * a * b))  # of an AUC of one half (Mann and Whitney 1947)
    if float(report["copy_auc"]) - 0.5 > max(COPIED * touched / 2, 3 * error):
        return True
    equal, usual = float(report["equal_rows"]), float(report["equal_rows_floor"])
    share = (equal * made + usual * new) / (made + new)
    error = math.sqrt(share * (1 - share) * (1 / made + 1 / new))
    return equal - usual > max(COPIED * (1 - usual), 3 * error)


def _find(columns: Sequence[Column], target: str) -> int:
    names = [column.name for column in columns]
    if target not in names:
        raise UserError(f"target: no column {target!r} in the model; {nearest(target, names)}")
    return names.index(target)


def _check(fake: Rows, train: Rows, held: Rows, columns: Sequence[Column]) -> None:
    for what, rows in (("samples", fake), ("training rows", train), ("held-out rows", held)):
        assert rows.ndim == 2 and rows.shape[1] == len(columns), (what, rows.shape, len(columns))
        if len(rows) < FEWEST:
            raise UserError(f"only {len(rows)} {what}; at least {FEWEST} are needed to compare tables", code=1)


def table_report(
    fake: Rows,
    train: Rows,
    held: Rows,
    columns: Sequence[Column],
    *,
    target: str | None = None,
    trees: Trees | None = None,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """How real, varied, useful and new a generated table is; each `name` beside `name_floor`, the score of real rows.

    `c2st` and `c2st_logistic`: 1 if a classifier cannot tell samples from training rows. `shape_error` and
    `trend_error`, in percent, of columns and of pairs of columns. `alpha_precision` and `beta_recall`, of equally many
    rows of each set. `dcr_share`: samples nearer to training than to held-out rows; `copy_auc`: telling training from
    held-out rows by their nearest sample; both 0.5 if nothing is copied. `equal_rows`: samples that are training rows.
    `downstream`: learn on samples, predict the target of held-out rows (AUC, or error of a number in standard
    deviations); its floor learns on as many training rows, `downstream_real` on all.

    The floors take held-out rows in place of samples. The errors of columns and pairs are means over parts of the
    samples as large as the held-out part: of more rows, those of a perfect sample would be lower than the floor.

    Args:
        fake: Generated rows (N, D), on the columns' grids; NaN where missing, categories as level indices.
        train: Training rows (M, D).
        held: Held-out rows (K, D).
        columns: Columns of the table; those that are not modelled are passed over.
        target: Name of the column to predict; None leaves `downstream` out.
        trees: What detects and predicts; default `find_trees()`, and its name is in the report.
        seed: Seed of folds and subsets.

    Raises:
        UserError: A set has fewer than 20 rows, or there is no column called `target`.
    """
    columns, trees = [column for column in columns if column.modelled], trees or find_trees()
    _check(fake, train, held, columns)
    goal = None if target is None else _find(columns, target)
    report: dict[str, float | int | str] = {"n": len(fake), "n_train": len(train), "n_held": len(held)}
    report["trees"] = trees.name
    ranges = measured_space(train, columns, by_range=True, weight=1.0)
    few = min(max(FEWEST, min(NEIGHBOURS, NUMBERS // ranges.width)), len(fake), len(train), len(held))
    centre = ranges(_some(train, few, seed))
    equally = min(len(fake), len(held), DETECTED)
    base = _some(train, DETECTED, seed)
    for suffix, made in (("", fake), ("_floor", held)):
        some, equal = _some(made, DETECTED, seed), _dealt(made, equally, seed)
        report[f"c2st{suffix}"] = c2st(some, base, columns, trees=trees, seed=seed)
        report[f"c2st_logistic{suffix}"] = c2st(some, base, columns, linear=True, seed=seed)
        shapes = [list(shape_errors(part, train, columns).values()) for part in equal]
        report[f"shape_error{suffix}"] = float(np.mean(shapes))
        report[f"trend_error{suffix}"] = float(np.mean([trend_error(part, base, columns, seed) for part in equal]))
        precision, recall = precision_and_recall(ranges(_some(made, few, seed)), centre)
        report |= {f"alpha_precision{suffix}": precision, f"beta_recall{suffix}": recall}
        report[f"equal_rows{suffix}"] = equal_share(made, train)
        if goal is not None:
            learned = made if made is fake else _some(train, len(fake), seed)
            report[f"downstream{suffix}"] = downstream(learned, held, columns, goal, trees=trees, seed=seed)
    if goal is not None and len(fake) < len(train):
        report["downstream_real"] = downstream(train, held, columns, goal, trees=trees, seed=seed)
    deviations = measured_space(train, columns, by_range=False, weight=0.5**0.5)
    return report | _copying(fake, train, held, deviations, seed)
