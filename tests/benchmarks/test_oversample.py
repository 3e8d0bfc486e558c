"""The benchmark of oversampling: SMOTE, scores, held-out share, records."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sfumato.modalities.table.columns import Column
from tests.benchmarks.loading import load_benchmark


@pytest.fixture
def oversample(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("oversample", monkeypatch)


def test_smote_interpolates_between_neighbours(oversample: ModuleType):
    """Two distant clusters, each with its own category: no new row lies between them, none is a copy."""
    rng = np.random.default_rng(0)
    cluster = np.repeat([0.0, 1.0], 50)
    rows = np.stack([100 * cluster + rng.normal(size=100), rng.normal(size=100), cluster], 1)
    new = oversample.smote(rows, 400, np.array([False, False, True]), np.random.default_rng(1))
    assert new.shape == (400, 3) and set(new[:, 2]) == {0.0, 1.0}
    assert (abs(new[:, 0] - 100 * new[:, 2]) < 4).all()
    for k in (0, 1):
        inside, given = new[new[:, 2] == k, :2], rows[cluster == k, :2]
        assert (inside >= given.min(0)).all() and (inside <= given.max(0)).all()
    assert not (new[:, None, :2] == rows[None, :, :2]).all(2).any()


def test_good_rows_score_higher_than_noise(oversample: ModuleType):
    """Average precision of each method; the rare class is centred at (2, 2)."""
    rng = np.random.default_rng(0)

    def rows(common: int, rare: int) -> np.ndarray:
        x = rng.normal(size=(common + rare, 2))
        x[common:] += 2
        return np.column_stack([x, np.repeat([0.0, 1.0], [common, rare])])

    columns = [Column("a", "number"), Column("b", "number"), Column("kind", "category", levels=["no", "yes"])]
    train, test = rows(400, 20), rows(2_000, 200)
    good = oversample.scores(train, columns, 2, np.concatenate([train, rows(0, 380)]), test, 0)
    noise = rng.normal(size=(380, 2)) - 2
    bad = oversample.scores(train, columns, 2, np.concatenate([train, np.column_stack([noise, np.ones(380)])]), test, 0)
    assert set(good) == set(oversample.METHODS) and all(0 < value <= 1 for value in good.values())
    assert good["real"] == bad["real"] and good["augment"] > max(bad["augment"], 0.5)


def test_two_percent_of_rows_are_held_out(oversample: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other methods see all rows."""
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "schema.json").write_text('{"target": "kind", "categorical": ["kind"]}')
    seen: list[str] = []

    def call(argv: list[str]) -> None:
        seen.extend(argv)
        raise oversample.Failed("enough")

    monkeypatch.setattr(oversample, "call", call)
    assert oversample.main(["--data", str(tmp_path), "--names", "default", "--out", str(tmp_path / "out")]) == 1
    assert seen[2] == "fit" and seen[seen.index("--set") + 1] == "data.held_out=0.02"


def test_records_are_reused_for_equal_requests(
    oversample: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[tuple[str, int]] = []

    def measure(name: str, seed: int, options: Any) -> dict[str, Any]:
        seen.append((name, seed))
        return {**dict.fromkeys(oversample.METHODS, 0.4), "augment": 0.5 + 0.1 * seed, "fit": 300.0, "made": 20.0}

    monkeypatch.setattr(oversample, "measure", measure)
    argv = ["--data", str(tmp_path), "--names", "default", "--seeds", "0,1", "--out", str(tmp_path / "out")]
    assert oversample.main(argv) == oversample.main(argv) == 0
    assert seen == [("default", 0), ("default", 1)]
    assert capsys.readouterr().out.splitlines()[2].endswith("| 0.550 ± 0.071 | 300 | 20 |")
    assert oversample.main([*argv, "--budget", "1m"]) == 0 and len(seen) == 4
