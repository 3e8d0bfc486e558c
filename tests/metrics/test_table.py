"""Figures of tables against what they must be by definition."""

import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from sfumato.errors import UserError
from sfumato.metrics import c2st, columns, downstream, find_trees, table_report
from sfumato.metrics.distances import neighbours
from sfumato.metrics.points import closer_share, copy_auc, measured_space, precision_and_recall
from sfumato.metrics.table import _copying, equal_share, looks_copied
from sfumato.metrics.trees import auc, folds


@dataclass
class Column:
    name: str
    levels: list[str] = field(default_factory=list)
    modelled: bool = True


MIXED = [Column("x"), Column("y"), Column("z"), Column("c", ["a", "b", "c"]), Column("flag", ["no", "yes"])]
TREES = find_trees()


def rows(n: int, seed: int) -> np.ndarray:
    """Numbers that follow one another, two categories that follow from them, and some missing cells."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = x + 0.3 * rng.normal(size=n)
    z = np.abs(y) + 0.1 * rng.normal(size=n)
    c = np.digitize(x + 0.2 * rng.normal(size=n), [-0.5, 0.5])
    table = np.stack([x, y, z, c, z > 0.7], 1).astype(float)
    table[rng.random(n) < 0.1, 2] = np.nan
    table[rng.random(n) < 0.1, 3] = np.nan
    return table


def shuffled(table: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same columns without any dependence between them."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(column) for column in table.T], 1)


# -- columns and pairs


def test_distance_of_a_shift():
    x = np.arange(1024) / 1024
    assert columns.kolmogorov(x, x) == 0
    assert columns.kolmogorov(x, x + 0.25) == columns.kolmogorov(x, x - 0.25) == 0.25
    assert columns.kolmogorov(x, np.where(x < 0.25, np.nan, x)) == 0.25
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=300).round(1), rng.normal(0.2, 1.1, 500).round(1)
    assert columns.kolmogorov(a, b) == pytest.approx(ks_2samp(a, b).statistic)


def test_total_variation():
    a, b = np.repeat([0, 1], [50, 50]), np.repeat([0, 1], [180, 20])
    assert columns.total_variation(a, a) == 0
    assert columns.total_variation(a, b) == pytest.approx(0.4)
    assert columns.total_variation(a * 10**9, b * 10**9) == pytest.approx(0.4)  # too many cells to count in full
    assert columns.total_variation(a, a + 2) == 1


def test_errors_of_columns():
    real = np.stack([np.arange(1024) / 1024, np.repeat([0.0, 1.0], [512, 512])], 1)
    fake = np.stack([real[:, 0] + 0.25, np.repeat([0.0, np.nan], [512, 512])], 1)
    errors = columns.shape_errors(fake, real, [Column("n"), Column("c", ["a", "b"])])
    assert errors == {"n": pytest.approx(25), "c": pytest.approx(50)}


def test_errors_of_pairs():
    rng = np.random.default_rng(0)
    n = 20_000
    x, e = rng.normal(size=(2, n))
    real = np.stack([x, 0.8 * x + 0.6 * e], 1)
    fake = np.stack([x, e], 1)
    pair = [Column("x"), Column("y")]
    assert columns.trend_error(real, real, pair) == 0
    assert columns.trend_error(fake, real, pair) == pytest.approx(40, abs=1)  # half of the correlation 0.8

    coin, other = rng.integers(0, 2, (2, n)).astype(float)
    two = [Column("a", ["0", "1"]), Column("b", ["0", "1"])]
    linked, free = np.stack([coin, coin], 1), np.stack([coin, other], 1)
    assert columns.trend_error(free, linked, two) == pytest.approx(50, abs=1)

    number = np.where(coin == 1, 9.0, 0.0) + rng.random(n)
    mixed = [Column("a", ["0", "1"]), Column("n")]
    assert columns.trend_error(np.stack([other, number], 1), np.stack([coin, number], 1), mixed) == pytest.approx(
        50, abs=1
    )


def test_pairs_without_variation():
    table = np.stack([np.zeros(30), np.arange(30.0), np.full(30, np.nan)], 1)
    assert columns.trend_error(table, table, [Column("a"), Column("b"), Column("c")]) == 0
    assert columns.trend_error(table[:, :1], table[:, :1], [Column("a")]) == 0


def test_correlations_are_of_the_rows_that_have_both():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)) + [0, 1e6, 0, 0]
    table[rng.random((500, 4)) < 0.2] = np.nan
    table[:, 3] = 7.0
    found = columns.correlations(table)
    for i in range(3):
        for j in range(3):
            both = table[~np.isnan(table[:, [i, j]]).any(1)][:, [i, j]]
            assert found[i, j] == pytest.approx(np.corrcoef(both.T)[0, 1], abs=1e-6)
    assert not found[3].any() and not columns.correlations(np.full((5, 2), np.nan)).any()


def test_of_very_many_pairs_some_are_drawn(monkeypatch: pytest.MonkeyPatch):
    table, fake = rows(3000, 0), shuffled(rows(3000, 1))
    wide, many = (
        [np.hstack([t] * 4) for t in (table, fake)],
        [Column(f"{k}{c.name}", c.levels) for k in range(4) for c in MIXED],
    )
    whole = columns.trend_error(wide[1], wide[0], many)
    monkeypatch.setattr(columns, "MOST_PAIRS", 60)
    assert columns.trend_error(wide[1], wide[0], many) == pytest.approx(whole, rel=0.15)


def test_independent_columns_are_seen_by_pairs_only():
    table = rows(3000, 0)
    assert np.mean(list(columns.shape_errors(shuffled(table), table, MIXED).values())) == 0
    assert columns.trend_error(shuffled(table), table, MIXED) > 20
    assert columns.trend_error(rows(3000, 1), table, MIXED) < 2.5


# -- classifiers


def test_auc():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 80).round(1), rng.normal(size=90).round(1)
    assert auc(a, b) == pytest.approx(roc_auc_score(np.r_[np.ones(80), np.zeros(90)], np.r_[a, b]))


def test_folds_deal_each_class_evenly():
    y = np.repeat([0, 1], [30, 9])
    masks = list(folds(y, 3, 0))
    assert [(y[asked] == 1).sum() for _, asked in masks] == [3, 3, 3]
    assert (sum(asked.astype(int) for _, asked in masks) == 1).all() and all((k ^ a).all() for k, a in masks)


def test_two_samples_of_one_distribution_look_alike():
    assert c2st(rows(1500, 1), rows(1500, 2), MIXED) > 0.85
    assert c2st(rows(1500, 1), rows(1500, 2), MIXED, linear=True) > 0.85


def test_independent_columns_are_detected_by_trees_only():
    table = rows(1000, 0)
    assert c2st(shuffled(table), table, MIXED) < 0.15
    assert c2st(shuffled(table), table, MIXED, linear=True) > 0.8


def test_wrong_margins_are_detected_by_both():
    table, other = rows(1000, 0), rows(1000, 1)
    other[:, 3] = np.where(np.isnan(other[:, 3]), 0, other[:, 3])  # no longer missing
    other[:, 0] += 1
    assert c2st(other, table, MIXED) < 0.2 and c2st(other, table, MIXED, linear=True) < 0.65


def test_without_xgboost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    trees = find_trees()
    assert trees.name == "scikit-learn"
    table = rows(600, 0)
    assert c2st(shuffled(table), table, MIXED, trees=trees) < 0.25
    assert downstream(table, rows(300, 1), MIXED, 4, trees=trees) > 0.8
    many = [Column("x"), Column("c", [str(i) for i in range(400)])]
    rng = np.random.default_rng(0)
    wide = np.stack([rng.normal(size=600), rng.integers(0, 400, 600)], 1)
    assert 0 <= c2st(wide[:300], wide[300:], many, trees=trees) <= 1


def test_downstream():
    table, test = rows(800, 0), rows(800, 1)
    assert downstream(table, test, MIXED, 3) > 0.85  # three classes
    assert downstream(table, test, MIXED, 1) < 0.4  # a number, in standard deviations
    assert downstream(table, test, MIXED, 2) < 0.35  # with missing cells
    free = shuffled(table)
    assert downstream(free, test, MIXED, 3) == pytest.approx(0.5, abs=0.12) and downstream(free, test, MIXED, 1) > 0.95
    one = table.copy()
    one[:, 4] = 1
    one[:, 1] = 0.5
    assert downstream(one, test, MIXED, 4) == 0.5 and downstream(one, test, MIXED, 1) == 1


# -- points


def test_neighbours():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(n, 3))) for n in (40, 50))
    every = torch.cdist(a, b)
    far, which = neighbours(a, b)
    assert torch.allclose(far, every.min(1).values) and (which == every.argmin(1)).all()
    own = torch.cdist(a, a).fill_diagonal_(torch.inf)
    far, which = neighbours(a)
    assert torch.allclose(far, own.min(1).values) and (which == own.argmin(1)).all()


def test_space():
    table = np.array([[0.0, 0], [4, 1], [np.nan, np.nan]])
    space = measured_space(table, [Column("n"), Column("c", ["a", "b"])], by_range=True, weight=0.5**0.5)
    points = space(table)
    assert torch.cdist(points, points)[0, 1] == pytest.approx(2**0.5)  # one for the number, one for the category
    assert points[2, 0] == pytest.approx(0.5) and points.shape == (3, 5)


def cloud(n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 4)))


def test_precision_and_recall():
    precision, recall = precision_and_recall(cloud(1500, 1), cloud(1500, 2))
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.06)
    wide = precision_and_recall(4 * cloud(1500, 1), cloud(1500, 2))
    narrow = precision_and_recall(0.2 * cloud(1500, 1), cloud(1500, 2))
    assert wide[0] < 0.2 and narrow[0] < 0.2 and narrow[1] < 0.15
    half = cloud(1500, 1)
    half[:, 0] = half[:, 0].abs()  # one half of the space is never visited
    assert precision_and_recall(half, cloud(1500, 2))[1] < 0.42


def test_copies_are_noticed():
    train, held = cloud(1000, 0), cloud(1000, 1)
    drawn = train[torch.from_numpy(np.random.default_rng(2).integers(0, 1000, 1000))]
    # 1 - 1/e of the training rows are among the samples; the rest are told apart by chance
    assert copy_auc(drawn.split(300), train, held) == pytest.approx(0.816, abs=0.02)
    assert copy_auc([cloud(1000, 3)], train, held) == pytest.approx(0.5, abs=0.04)
    assert closer_share(drawn, train, held) == 1
    assert closer_share(cloud(1000, 3), train, held) == pytest.approx(0.5, abs=0.05)
    noisy = drawn + 0.05 * cloud(1000, 4)
    assert copy_auc([noisy], train, held) > 0.7 and closer_share(noisy, train, held) > 0.9


def test_equal_rows(monkeypatch: pytest.MonkeyPatch):
    table = rows(50, 0)
    mixed = np.concatenate([table[:10], rows(30, 1)])
    mixed[0, 0], table[0, 0] = -0.0, 0.0
    assert equal_share(mixed, table) == 0.25
    monkeypatch.setattr("sfumato.metrics.table.PIECE", 3)  # whatever the size of the pieces
    assert equal_share(mixed, table) == 0.25


# -- the report

FIGURES = (
    *("c2st", "c2st_logistic", "shape_error", "trend_error", "alpha_precision", "beta_recall", "equal_rows"),
    *("downstream", "dcr_share", "copy_auc"),
)


def test_report():
    train, held = rows(800, 0), rows(400, 1)
    table = [Column("id", modelled=False), *MIXED]
    report = table_report(rows(800, 2), train, held, table, target="flag")
    assert {*FIGURES, *(f"{name}_floor" for name in FIGURES)} == set(report) - {"n", "n_train", "n_held", "trees"}
    assert report["n"] == 800 and report["n_held"] == 400 and report["trees"] == TREES.name
    for name in FIGURES:  # a perfect sample scores as real rows do
        loose = 6 if "error" in name else 0.15
        assert report[name] == pytest.approx(report[f"{name}_floor"], abs=loose), name
    assert report == table_report(rows(800, 2), train, held, table, target="flag")


def test_report_of_copies_and_of_independent_columns():
    train, held = rows(600, 0), rows(300, 1)
    drawn = table_report(train[np.random.default_rng(0).integers(0, 600, 600)], train, held, MIXED)
    assert drawn["equal_rows"] == 1 and drawn["copy_auc"] > 0.75 and drawn["dcr_share"] > 0.6
    free = table_report(shuffled(train), train, held, MIXED)
    assert (
        free["shape_error"] < 1.2 * free["shape_error_floor"]
        and free["c2st"] < 0.25
        and free["trend_error"] > 4 * free["trend_error_floor"]
    )
    assert "downstream" not in free


def test_what_is_learned_from_few_rows_stands_beside_as_few_real_ones():
    train, held = rows(900, 0), rows(100, 1)
    report = table_report(train[:60], train, held, MIXED, target="flag")
    assert report["downstream"] == pytest.approx(report["downstream_floor"], abs=0.1)
    assert report["downstream_real"] == downstream(train, held, MIXED, 4)


@pytest.mark.parametrize(("count", "held_out", "drawn"), [(200, 20, 1000), (900, 100, 100), (900, 100, 900)])
def test_copies_are_told_from_honest_rows(count: int, held_out: int, drawn: int):
    """Whatever the number of rows that were drawn: of fewer than there are, fewer can be copied."""
    said: dict[str, list[bool]] = {"copied": [], "honest": []}
    for seed in range(4):
        train, held, rng = rows(count, 10 * seed), rows(held_out, 10 * seed + 1), np.random.default_rng(seed)
        for name, made in (("copied", train[rng.integers(0, count, drawn)]), ("honest", rows(drawn, 10 * seed + 2))):
            space = measured_space(train, MIXED, by_range=False, weight=0.5**0.5)
            report = _copying(made, train, held, space, 0) | {"n": drawn, "n_train": count, "n_held": held_out}
            report |= {"equal_rows": equal_share(made, train), "equal_rows_floor": equal_share(held, train)}
            said[name].append(looks_copied(report))
    assert said == {"copied": [True] * 4, "honest": [False] * 4}


def test_the_order_of_a_file_does_not_hide_copies():
    train, held = rows(6000, 0), rows(600, 1)
    train = train[train[:, 0].argsort()]  # what follows one another in the file is alike
    space = measured_space(train, MIXED, by_range=False, weight=0.5**0.5)
    made = train[np.random.default_rng(0).integers(0, 6000, 2000)]
    report = _copying(made, train, held, space, 0)
    assert report["dcr_share"] > 0.52 and report["dcr_share_floor"] == pytest.approx(0.5, abs=0.05)


def test_near_copies_are_told_too():
    train, held = rows(600, 0), rows(200, 1)
    made = train[np.random.default_rng(0).integers(0, 600, 600)] + [0.02, 0.02, 0.02, 0, 0] * rows(600, 5)
    made[:, 3:] = train[np.random.default_rng(0).integers(0, 600, 600), 3:]
    report = table_report(made, train, held, MIXED)
    assert report["equal_rows"] == 0 and looks_copied(report)


def test_mistakes():
    table = rows(30, 0)
    with pytest.raises(UserError, match=r"target: no column 'flog' in the model; did you mean 'flag'\?"):
        table_report(table, table, table, MIXED, target="flog")
    with pytest.raises(UserError, match="only 10 held-out rows; at least 20 are needed"):
        table_report(table, table, table[:10], MIXED)
