"""The benchmark of small tables: disjoint halves, and a copy is detected."""

import shutil
from pathlib import Path

import pytest

from tests.benchmarks.loading import load_benchmark


def test_copies_are_detected_and_new_rows_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = load_benchmark("small_tables", monkeypatch)
    first, second = small.halves("diabetes", 0)
    assert not set(first.index) & set(second.index) and len(first) + len(second) == 442

    def call(argv: list[str]) -> None:  # a model that returns rows of the other half
        if argv[2] == "generate":
            shutil.copy(tmp_path / "diabetes-0" / "data" / "test.csv", argv[argv.index("--out") + 1])

    monkeypatch.setattr(small, "call", call)
    assert small.main(["--names", "diabetes", "--seeds", "0", "--out", str(tmp_path)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[3] for line in lines[1:3]] == ["independent columns", "gaussian copula"]
    assert all(float(line[4]) < 0.65 for line in lines[1:3])  # they contain no training row
    made, copy = lines[0], lines[3]
    assert made[3] == "sfumato" and float(made[4]) < 0.1 and float(made[5]) == 0
    assert copy[3] == "bootstrap copy" and float(copy[4]) > 0.75 and float(copy[5]) == 1
