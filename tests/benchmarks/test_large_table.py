"""The benchmark of large tables: its synthetic table, and a row per command."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato.modalities.table.read import read_table
from tests.benchmarks.loading import load_benchmark


def test_one_row_per_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    large, called = load_benchmark("large_table", monkeypatch), list[str]()

    def call(argv: list[str]) -> SimpleNamespace:
        called.append(argv[2])
        return SimpleNamespace(output='{"c2st": 0.5, "copy_auc": 0.25, "n": 3}', seconds=12.4, gib=1.257)

    monkeypatch.setattr(large, "call", call)
    monkeypatch.setattr(large, "CHUNK", 300)
    assert large.main(["--rows", "1000", "--out", str(tmp_path)]) == 0
    assert called == ["fit", "generate", "evaluate"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| evaluate | 12 | 1.26 | c2st 0.500, copy_auc 0.250 |"
    train, held = read_table(tmp_path / "1000.csv")
    kinds = [column.kind for column in train.columns]
    assert len(train) + len(held) == 1_000 and len(kinds) == 20
    assert (kinds.count("number"), kinds.count("category"), kinds.count("date")) == (10, 5, 1)
    assert next(c for c in train.columns if c.name == "number 3").missing is not None
