"""What a run tells: each report and each finished stage, shown and recorded."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from sfumato.apps.progress import ProgressLine
from sfumato.training.log import Log
from sfumato.training.loop import Report, Summary
from tests.training.common import record, rows, small_fit

REPORT = Report("codec", 50, 100, {"loss": 0.5, "rec": 0.25}, 1e-3, 640.0, 0.31, 7.0)
SUMMARY = Summary("codec", 100, 6_400, 12.5, 512.0, 0.25)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path, ProgressLine())


def test_a_report_is_shown_with_speed_and_share(log: Log, capsys: pytest.CaptureFixture[str]):
    log.report(REPORT)
    shown = capsys.readouterr().err.split("  ")
    assert [part.strip() for part in shown if part.strip()][-4:] == [
        "loss 0.5",
        "640 items/s",
        "31 % of peak",
        "eta 0:07",
    ]


def test_a_report_is_recorded_with_speed_and_share(log: Log):
    log.report(REPORT)
    (row,) = rows(log.folder)
    assert (row["items_per_second"], row["share_of_peak"], row["loss"], row["rec"]) == (640.0, 0.31, 0.5, 0.25)


def test_a_stage_ends_with_a_line(log: Log, capsys: pytest.CaptureFixture[str]):
    log.finish(SUMMARY)
    (line,) = capsys.readouterr().err.splitlines()
    words = " ".join(line.split())
    assert words == "codec 100 % 100 steps 6,400 items took 0:12 512 items/s 25 % of peak"


def test_a_share_that_was_not_measured_is_not_shown(log: Log, capsys: pytest.CaptureFixture[str]):
    log.finish(Summary("codec", 100, 6_400, 12.5, 512.0, 0.0))
    assert "peak" not in capsys.readouterr().err


def test_a_run_tells_of_each_stage(source: Path, tmp_path: Path):
    """Also with steps in place of a budget: operations are counted while the plan is tried out."""
    shown: list[tuple[str, int, int, dict[str, float]]] = []

    def progress(stage: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        shown.append((stage, done, total, dict(facts)))

    small_fit(source, tmp_path, progress=progress)
    kept = record(tmp_path)["stages"]
    for stage, batch in (("codec", 8), ("denoiser", 16)):
        report, end = [(done, total, facts) for name, done, total, facts in shown if name == stage][-2:]
        assert report[2]["items/s"] > 0 and 0 < report[2]["of peak"] < 1
        assert end[:2] == (10, 10) and end[2]["steps"] == 10 and end[2]["items"] == 10 * batch
        known = kept[stage]
        assert known["steps"] == 10 and known["items"] == 10 * batch
        assert known["items_per_second"] == pytest.approx(10 * batch / known["seconds"])
        flops = record(tmp_path)["measured"][stage]["flops"]
        assert known["share_of_peak"] == pytest.approx(10 * flops / known["seconds"] / record(tmp_path)["peak"])
        assert end[2]["of peak"] == pytest.approx(known["share_of_peak"]) and flops > 0
