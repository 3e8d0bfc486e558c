"""Metrics of tables against values that follow from their definitions."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from sfumato.errors import UserError
from sfumato.metrics.distances import nearest_neighbours
from sfumato.modalities.table import marginals
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.metrics import (
    _copy_metrics,
    c2st,
    downstream_score,
    equal_row_share,
    looks_copied,
    table_report,
)
from sfumato.modalities.table.neighbours import alpha_precision_beta_recall, copy_auc, dcr_share, fit_embedding
from sfumato.modalities.table.trees import auc, find_trees, stratified_folds


def number_column(name: str) -> Column:
    return Column(name, "number")


def category_column(name: str, *levels: str) -> Column:
    return Column(name, "category", list(levels))


MIXED = [
    number_column("x"),
    number_column("y"),
    number_column("z"),
    category_column("c", "a", "b", "c"),
    category_column("flag", "no", "yes"),
]
TREES = find_trees()


def rows(n: int, seed: int) -> np.ndarray:
    """Dependent numbers, two categories that depend on them, and some missing cells."""
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
    """The same columns, independent of each other."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(column) for column in table.T], 1)


# -- columns and pairs


def test_ks_distance_of_a_shift():
    x = np.arange(1024) / 1024
    assert marginals.ks_distance(x, x) == 0
    assert marginals.ks_distance(x, x + 0.25) == marginals.ks_distance(x, x - 0.25) == 0.25
    assert marginals.ks_distance(x, np.where(x < 0.25, np.nan, x)) == 0.25
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=300).round(1), rng.normal(0.2, 1.1, 500).round(1)
    assert marginals.ks_distance(a, b) == pytest.approx(ks_2samp(a, b).statistic)


def test_total_variation():
    a, b = np.repeat([0, 1], [50, 50]), np.repeat([0, 1], [180, 20])
    assert marginals.total_variation(a, a) == 0
    assert marginals.total_variation(a, b) == pytest.approx(0.4)
    assert marginals.total_variation(a * 10**9, b * 10**9) == pytest.approx(0.4)  # too many cells for a dense table
    assert marginals.total_variation(a, a + 2) == 1


def test_shape_errors():
    real = np.stack([np.arange(1024) / 1024, np.repeat([0.0, 1.0], [512, 512])], 1)
    fake = np.stack([real[:, 0] + 0.25, np.repeat([0.0, np.nan], [512, 512])], 1)
    errors = marginals.shape_errors(fake, real, [number_column("n"), category_column("c", "a", "b")])
    assert errors == {"n": pytest.approx(25), "c": pytest.approx(50)}


def test_trend_error():
    rng = np.random.default_rng(0)
    n = 20_000
    x, e = rng.normal(size=(2, n))
    real = np.stack([x, 0.8 * x + 0.6 * e], 1)
    fake = np.stack([x, e], 1)
    pair = [number_column("x"), number_column("y")]
    assert marginals.trend_error(real, real, pair) == 0
    assert marginals.trend_error(fake, real, pair) == pytest.approx(40, abs=1)  # half of the correlation 0.8

    coin, other = rng.integers(0, 2, (2, n)).astype(float)
    two = [category_column("a", "0", "1"), category_column("b", "0", "1")]
    dependent, independent = np.stack([coin, coin], 1), np.stack([coin, other], 1)
    assert marginals.trend_error(independent, dependent, two) == pytest.approx(50, abs=1)

    number = np.where(coin == 1, 9.0, 0.0) + rng.random(n)
    mixed = [category_column("a", "0", "1"), number_column("n")]
    assert marginals.trend_error(np.stack([other, number], 1), np.stack([coin, number], 1), mixed) == pytest.approx(
        50, abs=1
    )


def test_constant_columns_have_no_trend_error():
    table = np.stack([np.zeros(30), np.arange(30.0), np.full(30, np.nan)], 1)
    assert marginals.trend_error(table, table, [number_column("a"), number_column("b"), number_column("c")]) == 0
    assert marginals.trend_error(table[:, :1], table[:, :1], [number_column("a")]) == 0


def test_correlations_use_the_rows_that_have_both_columns():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)) + [0, 1e6, 0, 0]
    table[rng.random((500, 4)) < 0.2] = np.nan
    table[:, 3] = 7.0
    result = marginals.correlations(table)
    for i in range(3):
        for j in range(3):
            both = table[~np.isnan(table[:, [i, j]]).any(1)][:, [i, j]]
            assert result[i, j] == pytest.approx(np.corrcoef(both.T)[0, 1], abs=1e-6)
    assert not result[3].any() and not marginals.correlations(np.full((5, 2), np.nan)).any()


def test_a_random_sample_of_many_pairs(monkeypatch: pytest.MonkeyPatch):
    table, fake = rows(3000, 0), shuffled(rows(3000, 1))
    wide, many = (
        [np.hstack([t] * 4) for t in (table, fake)],
        [replace(c, name=f"{k}{c.name}") for k in range(4) for c in MIXED],
    )
    exact = marginals.trend_error(wide[1], wide[0], many)
    monkeypatch.setattr(marginals, "MAX_PAIRS", 60)
    assert marginals.trend_error(wide[1], wide[0], many) == pytest.approx(exact, rel=0.15)


def test_only_the_trend_error_detects_independent_columns():
    table = rows(3000, 0)
    assert np.mean(list(marginals.shape_errors(shuffled(table), table, MIXED).values())) == 0
    assert marginals.trend_error(shuffled(table), table, MIXED) > 20
    assert marginals.trend_error(rows(3000, 1), table, MIXED) < 2.5


# -- classifiers


def test_auc():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 80).round(1), rng.normal(size=90).round(1)
    assert auc(a, b) == pytest.approx(roc_auc_score(np.r_[np.ones(80), np.zeros(90)], np.r_[a, b]))


def test_folds_are_stratified():
    y = np.repeat([0, 1], [30, 9])
    masks = list(stratified_folds(y, 3, 0))
    assert [(y[test] == 1).sum() for _, test in masks] == [3, 3, 3]
    assert (sum(test.astype(int) for _, test in masks) == 1).all() and all(
        (train ^ test).all() for train, test in masks
    )


def test_c2st_of_two_samples_of_one_distribution():
    assert c2st(rows(1500, 1), rows(1500, 2), MIXED) > 0.85
    assert c2st(rows(1500, 1), rows(1500, 2), MIXED, linear=True) > 0.85


def test_only_trees_detect_independent_columns():
    table = rows(1000, 0)
    assert c2st(shuffled(table), table, MIXED) < 0.15
    assert c2st(shuffled(table), table, MIXED, linear=True) > 0.8


def test_both_classifiers_detect_wrong_marginals():
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
    assert downstream_score(table, rows(300, 1), MIXED, 4, trees=trees) > 0.8
    many = [number_column("x"), category_column("c", *map(str, range(400)))]
    rng = np.random.default_rng(0)
    wide = np.stack([rng.normal(size=600), rng.integers(0, 400, 600)], 1)
    assert 0 <= c2st(wide[:300], wide[300:], many, trees=trees) <= 1


def test_downstream():
    table, test = rows(800, 0), rows(800, 1)
    assert downstream_score(table, test, MIXED, 3) > 0.85  # three classes
    assert downstream_score(table, test, MIXED, 1) < 0.4  # a number, in standard deviations
    assert downstream_score(table, test, MIXED, 2) < 0.35  # with missing cells
    independent = shuffled(table)
    assert (
        downstream_score(independent, test, MIXED, 3) == pytest.approx(0.5, abs=0.12)
        and downstream_score(independent, test, MIXED, 1) > 0.95
    )
    constant = table.copy()
    constant[:, 4] = 1
    constant[:, 1] = 0.5
    assert downstream_score(constant, test, MIXED, 4) == 0.5 and downstream_score(constant, test, MIXED, 1) == 1


# -- embeddings


def test_neighbours():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(n, 3))) for n in (40, 50))
    every = torch.cdist(a, b)
    far, which = nearest_neighbours(a, b)
    assert torch.allclose(far, every.min(1).values) and (which == every.argmin(1)).all()
    own = torch.cdist(a, a).fill_diagonal_(torch.inf)
    far, which = nearest_neighbours(a)
    assert torch.allclose(far, own.min(1).values) and (which == own.argmin(1)).all()


def test_embedding():
    table = np.array([[0.0, 0], [4, 1], [np.nan, np.nan]])
    embedding = fit_embedding(
        table, [number_column("n"), category_column("c", "a", "b")], by_range=True, weight=0.5**0.5
    )
    points = embedding(table)
    assert torch.cdist(points, points)[0, 1] == pytest.approx(2**0.5)  # one for the number, one for the category
    assert points[2, 0] == pytest.approx(0.5) and points.shape == (3, 5)


def cloud(n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 4)))


def test_precision_and_recall():
    precision, recall = alpha_precision_beta_recall(cloud(1500, 1), cloud(1500, 2))
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.06)
    wide = alpha_precision_beta_recall(4 * cloud(1500, 1), cloud(1500, 2))
    narrow = alpha_precision_beta_recall(0.2 * cloud(1500, 1), cloud(1500, 2))
    assert wide[0] < 0.2 and narrow[0] < 0.2 and narrow[1] < 0.15
    half = cloud(1500, 1)
    half[:, 0] = half[:, 0].abs()  # half of the space has no samples
    assert alpha_precision_beta_recall(half, cloud(1500, 2))[1] < 0.42


def test_copies_have_a_high_copy_auc():
    train, held = cloud(1000, 0), cloud(1000, 1)
    copies = train[torch.from_numpy(np.random.default_rng(2).integers(0, 1000, 1000))]
    # 1 - 1/e of the training rows are among the samples; for the rest the test is chance
    assert copy_auc(copies.split(300), train, held) == pytest.approx(0.816, abs=0.02)
    assert copy_auc([cloud(1000, 3)], train, held) == pytest.approx(0.5, abs=0.04)
    assert dcr_share(copies, train, held) == 1
    assert dcr_share(cloud(1000, 3), train, held) == pytest.approx(0.5, abs=0.05)
    noisy = copies + 0.05 * cloud(1000, 4)
    assert copy_auc([noisy], train, held) > 0.7 and dcr_share(noisy, train, held) > 0.9


def test_equal_rows(monkeypatch: pytest.MonkeyPatch):
    table = rows(50, 0)
    mixed = np.concatenate([table[:10], rows(30, 1)])
    mixed[0, 0], table[0, 0] = -0.0, 0.0
    assert equal_row_share(mixed, table) == 0.25
    monkeypatch.setattr("sfumato.modalities.table.metrics.CHUNK_ROWS", 3)  # whatever the size of the chunks
    assert equal_row_share(mixed, table) == 0.25


# -- the report

METRICS = (
    *("c2st", "c2st_logistic", "shape_error", "trend_error", "alpha_precision", "beta_recall", "equal_rows"),
    *("downstream", "dcr_share", "copy_auc"),
)


def test_report():
    train, held = rows(800, 0), rows(400, 1)
    table = [Column("id", "id"), *MIXED]
    report = table_report(rows(800, 2), train, held, table, target="flag")
    assert {*METRICS, *(f"{name}_floor" for name in METRICS)} == set(report) - {"n", "n_train", "n_held", "trees"}
    assert report["n"] == 800 and report["n_held"] == 400 and report["trees"] == TREES.name
    for name in METRICS:  # a perfect sample scores like real rows
        tolerance = 6 if "error" in name else 0.15
        assert report[name] == pytest.approx(report[f"{name}_floor"], abs=tolerance), name
    assert report == table_report(rows(800, 2), train, held, table, target="flag")


def test_report_of_copies_and_independent_columns():
    train, held = rows(600, 0), rows(300, 1)
    copies = table_report(train[np.random.default_rng(0).integers(0, 600, 600)], train, held, MIXED)
    assert copies["equal_rows"] == 1 and copies["copy_auc"] > 0.75 and copies["dcr_share"] > 0.6
    independent = table_report(shuffled(train), train, held, MIXED)
    assert (
        independent["shape_error"] < 1.2 * independent["shape_error_floor"]
        and independent["c2st"] < 0.25
        and independent["trend_error"] > 4 * independent["trend_error_floor"]
    )
    assert "downstream" not in independent


def test_the_downstream_floor_trains_on_as_many_real_rows():
    train, held = rows(900, 0), rows(100, 1)
    report = table_report(train[:60], train, held, MIXED, target="flag")
    assert report["downstream"] == pytest.approx(report["downstream_floor"], abs=0.1)
    assert report["downstream_real"] == downstream_score(train, held, MIXED, 4)


@pytest.mark.parametrize(("count", "held_out", "samples"), [(200, 20, 1000), (900, 100, 100), (900, 100, 900)])
def test_copies_look_copied_and_new_rows_do_not(count: int, held_out: int, samples: int):
    """Also if there are fewer samples than training rows, so that fewer can be copied."""
    verdicts: dict[str, list[bool]] = {"copied": [], "new": []}
    for seed in range(4):
        train, held, rng = rows(count, 10 * seed), rows(held_out, 10 * seed + 1), np.random.default_rng(seed)
        fakes = {"copied": train[rng.integers(0, count, samples)], "new": rows(samples, 10 * seed + 2)}
        for name, fake in fakes.items():
            embedding = fit_embedding(train, MIXED, by_range=False, weight=0.5**0.5)
            report = {"n": samples, "n_train": count, "n_held": held_out}
            report |= _copy_metrics(fake, train, held, embedding, 0)
            report |= {"equal_rows": equal_row_share(fake, train), "equal_rows_floor": equal_row_share(held, train)}
            verdicts[name].append(looks_copied(report))
    assert verdicts == {"copied": [True] * 4, "new": [False] * 4}


def test_copies_are_found_in_a_sorted_file():
    train, held = rows(6000, 0), rows(600, 1)
    train = train[train[:, 0].argsort()]  # consecutive rows are similar
    embedding = fit_embedding(train, MIXED, by_range=False, weight=0.5**0.5)
    samples = train[np.random.default_rng(0).integers(0, 6000, 2000)]
    report = _copy_metrics(samples, train, held, embedding, 0)
    assert report["dcr_share"] > 0.52 and report["dcr_share_floor"] == pytest.approx(0.5, abs=0.05)


def test_near_copies_look_copied():
    train, held = rows(600, 0), rows(200, 1)
    samples = train[np.random.default_rng(0).integers(0, 600, 600)] + [0.02, 0.02, 0.02, 0, 0] * rows(600, 5)
    samples[:, 3:] = train[np.random.default_rng(0).integers(0, 600, 600), 3:]
    report = table_report(samples, train, held, MIXED)
    assert report["equal_rows"] == 0 and looks_copied(report)


def test_invalid_arguments():
    table = rows(30, 0)
    with pytest.raises(UserError, match=r"target: no column 'flog' in the model; did you mean 'flag'\?"):
        table_report(table, table, table, MIXED, target="flog")
    with pytest.raises(UserError, match="only 10 held-out rows; at least 20 are needed"):
        table_report(table, table, table[:10], MIXED)
