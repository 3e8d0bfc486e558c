"""The benchmark of tables: its baselines, and records are reused."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks.loading import load_benchmark


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield load_benchmark("tables", monkeypatch)


def correlated(count: int = 4_000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    x = rng.normal(size=count)
    y = np.exp(x + 0.3 * rng.normal(size=count))
    return pd.DataFrame({"x": x, "y": y, "kind": np.where(x > 0.5, "rare", "common")})


def test_baselines(tables: ModuleType):
    train = correlated()
    correlation = lambda frame: frame["x"].corr(frame["y"], method="spearman")
    samples = {kind: make(train, np.random.default_rng(1)) for kind, make in tables.BASELINES.items()}
    for frame in samples.values():
        assert len(frame) == len(train) and list(frame.columns) == list(train.columns)
        assert set(frame["x"]) <= set(train["x"])
        assert abs((frame["kind"] == "rare").mean() - (train["kind"] == "rare").mean()) < 0.03
    assert abs(correlation(samples["independent columns"])) < 0.06
    assert abs(correlation(samples["gaussian copula"]) - correlation(train)) < 0.03
    rows = set(train.itertuples(index=False, name=None))
    assert set(samples["bootstrap copy"].itertuples(index=False, name=None)) <= rows
    assert not set(samples["gaussian copula"].itertuples(index=False, name=None)) <= rows


def test_a_run_uses_the_categories_of_its_schema_and_is_stored(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "magic").mkdir()
    correlated(50).to_csv(tmp_path / "magic" / "train.csv", index=False)
    (tmp_path / "magic" / "schema.json").write_text(json.dumps({"categorical": ["kind"], "target": "kind"}))
    seen: list[list[str]] = []
    report = {
        "c2st": 0.7,
        "c2st_small": 0.8,
        "c2st_small_floor": 0.9,
        "trend_error": 2.0,
        "trend_error_floor": 1.5,
        "copy_auc": 0.5,
        "downstream": 0.9,
    }

    done = tables.call.__globals__["Completed"]("", 12.5, 1.0)
    monkeypatch.setattr(tables, "call", lambda argv: seen.append(argv) or done)
    monkeypatch.setattr(tables, "run_judge", lambda options, samples, name: report)
    argv = ["--data", str(tmp_path), "--names", "magic", "--budgets", "1m", "--judge", "j.py"]
    argv += ["--out", str(tmp_path / "out")]
    for _ in range(2):
        assert tables.main(argv) == 0
    fit, generate = seen
    assert fit[fit.index("--categorical") + 1] == "kind" and fit[fit.index("--budget") + 1] == "1m"
    assert generate[generate.index("-n") + 1] == "50"
    assert tables.main([*argv, "--set", "codec.width=64"]) == 1  # stored figures belong to other settings
    out, err = capsys.readouterr()
    assert "was made with other --set" in err
    lines = out.splitlines()[:12]
    assert lines[:6] == lines[6:] and "| magic | identity | 1m | 0 | 12.5 | 12.5 | 0.700 | 0.800 (0.900) |" in lines[5]
