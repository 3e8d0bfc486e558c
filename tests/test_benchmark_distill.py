"""The benchmark of few-step models: who is asked for what, and what the table says."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.loading import load_benchmark


class Said(NamedTuple):
    """What a command printed."""

    output: str


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("distill", monkeypatch)


@pytest.fixture
def calls(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were asked for; none is run."""
    seen: list[list[str]] = []

    def call(words: Sequence[str]) -> object:
        seen.append(list(words))
        if "distill" in words:
            Path(words[-1]).mkdir()
            (Path(words[-1]) / "model.json").write_text("{}")
            return Said("")
        of = lambda flag, default: words[words.index(flag) + 1] if flag in words else default
        steps, few = int(of("--steps", 15)), "student" in " ".join(words)
        made = {"seconds": 10.0, "sampler": of("--sampler", "jump" if few else "heun"), "steps": steps}
        report = {"fd": 2.0 if "teacher" == Path(words[3]).name else 3.0, "accuracy": 0.9}
        guided = {"guidance": 1.0} if few else {"guidance": 1.2, "autoguidance": 1.5}
        said = made | guided if "generate" in words else report
        return Said(json.dumps(said))

    monkeypatch.setattr(bench, "call", call)
    return seen


def test_a_row_a_way_of_sampling(bench: ModuleType, calls: list[list[str]], tmp_path: Path, capsys):
    words = ["runs/m", "mnist", "--out", str(tmp_path / "out")]
    assert bench.main(words) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 + 8 and {len(line) for line in lines} == {5}
    table = {line[0]: line[1:] for line in lines[2:]}
    assert table["teacher"] == ["116", "10.0", "2.000 (1.00×)", "0.900"]
    assert [table[f"teacher ddim {n}"][0] for n in (1, 2, 4, 8)] == ["4", "8", "16", "32"]
    assert [table[f"few-step {n}"][0] for n in (1, 2, 4)] == ["1", "2", "4"]
    assert table["few-step 1"][2] == "3.000 (1.50×)"
    assert calls[0][2:4] == ["distill", "runs/m"] and len(calls) == 1 + 2 * 8

    bench.main([*words, "--judge", "judge.py"])  # only what is new
    assert [call[:2] for call in calls[17:]] == [["judge.py", "images"]] * 8
    assert "judge: fd" in capsys.readouterr().out
    bench.main([*words, "--judge", "judge.py", "--cas"])
    assert [call[-1] for call in calls[25:]] == ["--cas"] * 8
    for other in (["runs/n", "mnist"], ["runs/m", "fashion-mnist"], ["runs/m", "mnist", "--seed", "1"]):
        assert bench.main([*other, "--out", str(tmp_path / "out")]) == 1
        assert "is of other" in capsys.readouterr().err
    assert len(calls) == 33


def test_a_failure_is_told(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    def fail(words: Sequence[str]) -> object:
        raise bench.Failed("exit code 2: distill")

    monkeypatch.setattr(bench, "call", fail)
    assert bench.main(["runs/m", "mnist", "--out", str(tmp_path)]) == 1
    assert "exit code 2" in capsys.readouterr().err
