"""The benchmark of few-step models: its commands and its table."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.benchmarks.loading import load_benchmark


class Completed(NamedTuple):
    """A finished command."""

    output: str


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("distill", monkeypatch)


@pytest.fixture
def calls(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were called; none is run."""
    seen: list[list[str]] = []

    def call(argv: Sequence[str]) -> object:
        seen.append(list(argv))
        if "distill" in argv:
            Path(argv[-1]).mkdir()
            (Path(argv[-1]) / "model.json").write_text("{}")
            return Completed("")
        value = lambda flag, default: argv[argv.index(flag) + 1] if flag in argv else default
        steps, few = int(value("--steps", 15)), "student" in " ".join(argv)
        sampling = {"seconds": 10.0, "sampler": value("--sampler", "jump" if few else "heun"), "steps": steps}
        report = {"fd": 2.0 if "teacher" == Path(argv[3]).name else 3.0, "accuracy": 0.9}
        guided = {"guidance": 1.0} if few else {"guidance": 1.2, "autoguidance": 1.5}
        answer = sampling | guided if "generate" in argv else report
        return Completed(json.dumps(answer))

    monkeypatch.setattr(bench, "call", call)
    return seen


def test_one_row_per_sampling(bench: ModuleType, calls: list[list[str]], tmp_path: Path, capsys):
    argv = ["runs/m", "mnist", "--out", str(tmp_path / "out")]
    assert bench.main(argv) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 + 8 and {len(line) for line in lines} == {5}
    table = {line[0]: line[1:] for line in lines[2:]}
    assert table["teacher"] == ["116", "10.0", "2.000 (1.00×)", "0.900"]
    assert [table[f"teacher ddim {n}"][0] for n in (1, 2, 4, 8)] == ["4", "8", "16", "32"]
    assert [table[f"few-step {n}"][0] for n in (1, 2, 4)] == ["1", "2", "4"]
    assert table["few-step 1"][2] == "3.000 (1.50×)"
    assert calls[0][2:4] == ["distill", "runs/m"] and len(calls) == 1 + 2 * 8

    bench.main([*argv, "--judge", "judge.py"])  # only the new part
    assert [call[:2] for call in calls[17:]] == [["judge.py", "images"]] * 8
    assert "judge: fd" in capsys.readouterr().out
    bench.main([*argv, "--judge", "judge.py", "--cas"])
    assert [call[-1] for call in calls[25:]] == ["--cas"] * 8
    for other in (["runs/n", "mnist"], ["runs/m", "fashion-mnist"], ["runs/m", "mnist", "--seed", "1"]):
        assert bench.main([*other, "--out", str(tmp_path / "out")]) == 1
        assert "was made with other" in capsys.readouterr().err
    assert len(calls) == 33


def test_a_failure_is_reported(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    def fail(argv: Sequence[str]) -> object:
        raise bench.Failed("exit code 2: distill")

    monkeypatch.setattr(bench, "call", fail)
    assert bench.main(["runs/m", "mnist", "--out", str(tmp_path)]) == 1
    assert "exit code 2" in capsys.readouterr().err
