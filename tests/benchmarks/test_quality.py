"""Bookkeeping of the benchmarks: commands, skipped parts, tables."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.loading import load_benchmark

REPORT = {"fd": 3.21, "fd_floor": 0.5, "accuracy": 0.99, "accuracy_floor": 0.993, "coverage": 0.9, "novelty": 0.95}


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("quality", monkeypatch)


@pytest.fixture
def calls(quality: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were called; none is run, but `fit` writes its records."""
    seen: list[list[str]] = []

    def call(argv: Sequence[str]) -> object:
        seen.append(list(argv))
        if "fit" in argv:
            if "cifar10" in argv:
                raise quality.Failed("exit code 1")
            run = Path(argv[argv.index("--out") + 1])
            run.mkdir(exist_ok=True)
            metrics = {"parameters": {"codec": 1_000, "denoiser": 2_000}, "codec": {"psnr": 25.04}}
            (run / "run.json").write_text(json.dumps({"metrics": metrics}))
            sample = {"sampler": "heun", "steps": 15, "guidance": 1.25}
            (run / "model.json").write_text(json.dumps({"sample": sample}))
        return quality.Completed(json.dumps(REPORT), 12.5, 1.234)

    monkeypatch.setattr(quality, "call", call)
    return seen


def test_one_row_per_run(
    quality: ModuleType, calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--data", "mnist", "--budgets", "5m,10m", "--seeds", "3", "--out", str(tmp_path / "runs")]
    assert quality.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:10] == ["mnist", "5m", "3", "12.5", "1.23", "3,000", "25.0", "heun 15", "1.25", "12.5"]
    assert cells[10:] == ["0.990 (0.993)", "3.210 (0.500)", "–", "0.900", "0.950"]
    assert [argv[2] for argv in calls] == ["fit", "generate", "evaluate"] * 2
    fit, generate = calls[:2]
    assert fit[fit.index("--budget") + 1] == "5m" and fit[fit.index("--seed") + 1] == "3"
    assert generate[generate.index("-n") + 1] == "10000" and "--guidance" not in generate

    quality.main(argv)  # again: nothing to do
    assert len(calls) == 6
    quality.main([*argv, "--judge", "judge.py"])  # only the new part
    assert [argv[:2] for argv in calls[6:]] == [["judge.py", "images"]] * 2
    assert calls[6][3:] == ["--reference", "mnist", "--cas"]
    assert "judge: fd" in capsys.readouterr().out


def test_failures_are_reported_and_the_rest_goes_on(
    quality: ModuleType, calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--data", "cifar10,mnist", "--out", str(tmp_path)]
    assert quality.main(argv) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "exit code 1" in err
    assert quality.main(["--data", "mnist", "--out", str(tmp_path), "--set", "codec.bottleneck=fsq"]) == 1
    assert "name another --out" in capsys.readouterr().err


def test_a_model_is_reused_for_equal_requests(quality: ModuleType, calls: list[list[str]], tmp_path: Path):
    run = tmp_path / "5m-0"
    options = argparse.Namespace(budget="5m", seed=0, set=["codec.width=32"])
    make = lambda: tmp_path / "source"
    for _ in range(2):
        quality.fit_once(make, run, {"set": ["codec.width=32"], "items": 96}, options)
    assert len(calls) == 1 and calls[0][2:4] == ["fit", str(tmp_path / "source")]
    assert calls[0][-2:] == ["--set", "codec.width=32"]
    for request in ({"set": [], "items": 96}, {"set": ["codec.width=32"], "items": 200}):
        with pytest.raises(
            quality.Failed, match=r"5m-0\.json was made with other --set or --items; name another --out"
        ):
            quality.fit_once(make, run, request, options)
    (tmp_path / "5m-0.json").unlink()  # a model without a record
    quality.fit_once(make, run, {"set": [], "items": 200}, options)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["emoji", "transfer"])
def test_other_settings_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With fewer test captions, some of them may have been trained on."""
    script = load_benchmark(name, monkeypatch)
    seen: list[dict] = []
    monkeypatch.setattr(script, "fit_once", lambda source, run, request, options: seen.append(request) or _stop())
    options = argparse.Namespace(data="digits", budget="5m", seed=0, set=["a=b"], items=7, out=tmp_path)
    with pytest.raises(InterruptedError):
        script.train_model(None, options) if name == "emoji" else list(script.table(options))
    assert seen == [{"set": ["a=b"], "items": 7} if name == "emoji" else {"set": ["a=b"]}]


def _stop() -> None:
    raise InterruptedError


def test_call_runs_a_new_process(quality: ModuleType):
    done = quality.call(["-c", "print('hello')"])
    assert done.output == "hello\n" and done.seconds >= 0 and 0.001 < done.gib < 2
    with pytest.raises(quality.Failed, match="exit code 3"):
        quality.call(["-c", "raise SystemExit(3)"])


PLAN = ["plan           0 %", "plan         100 %  eta 0:01"]
FEATURES = ["features       0 %", "features     100 %"]


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ([*PLAN, *FEATURES, "codec          2 %  loss 0.5"], [1, 2, 4]),
        ([*PLAN, "codec          2 %  loss 0.5", *FEATURES], [1, 2, 2]),
        (["a warning", "", *PLAN, *FEATURES], [3, 4, 6]),
        (PLAN, [1, 2, 2]),
    ],
)
def test_marks_of_progress_lines(lines: list[str], seconds: list[int], monkeypatch: pytest.MonkeyPatch):
    """Line i comes at second i."""
    assert load_benchmark("start", monkeypatch).marks(lines, iter(range(1, 9))) == seconds


def test_a_failed_start_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match="plan"):
        load_benchmark("start", monkeypatch).marks(["sfumato: nowhere: no such file or folder"], iter(range(9)))
