"""The log of a run: reports and stage summaries, shown and recorded."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from sfumato.apps.progress import ProgressLine
from sfumato.training.log import Log
from sfumato.training.trainer import Report, Summary
from tests.training.common import record, rows, small_fit

REPORT = Report("codec", 50, 100, {"loss": 0.5, "rec": 0.25}, 1e-3, 640.0, 0.31, 7.0)
SUMMARY = Summary("codec", 100, 6_400, 12.5, 512.0, 0.25)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path, ProgressLine())


def test_a_report_is_shown_with_speed_and_utilisation(log: Log, capsys: pytest.CaptureFixture[str]):
    log.report(REPORT)
    shown = capsys.readouterr().err.split("  ")
    assert [part.strip() for part in shown if part.strip()][-4:] == [
        "loss 0.5",
        "640 items/s",
        "31 % of peak",
        "eta 0:07",
    ]


def test_a_report_is_recorded_with_speed_and_utilisation(log: Log):
    log.report(REPORT)
    (row,) = rows(log.folder)
    assert (row["items_per_second"], row["share_of_peak"], row["loss"], row["rec"]) == (640.0, 0.31, 0.5, 0.25)


def test_a_stage_ends_with_a_summary(log: Log, capsys: pytest.CaptureFixture[str]):
    log.finish(SUMMARY)
    (line,) = capsys.readouterr().err.splitlines()
    words = " ".join(line.split())
    assert words == "codec 100 % 100 steps 6,400 items took 0:12 512 items/s 25 % of peak"


def test_utilisation_that_was_not_measured_is_not_shown(log: Log, capsys: pytest.CaptureFixture[str]):
    log.finish(Summary("codec", 100, 6_400, 12.5, 512.0, 0.0))
    assert "peak" not in capsys.readouterr().err


def test_a_run_logs_each_stage(source: Path, tmp_path: Path):
    """Also with steps instead of a budget: operations are counted in the dry run."""
    shown: list[tuple[str, int, int, dict[str, float]]] = []

    def progress(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        shown.append((stage, done, total, dict(metrics)))

    small_fit(source, tmp_path, progress=progress)
    stages = record(tmp_path)["stages"]
    for stage, batch in (("codec", 8), ("denoiser", 16)):
        report, final = [(done, total, metrics) for name, done, total, metrics in shown if name == stage][-2:]
        assert report[2]["items/s"] > 0 and 0 < report[2]["of peak"] < 1
        assert final[:2] == (10, 10) and final[2]["steps"] == 10 and final[2]["items"] == 10 * batch
        summary = stages[stage]
        assert summary["steps"] == 10 and summary["items"] == 10 * batch
        assert summary["items_per_second"] == pytest.approx(10 * batch / summary["seconds"])
        flops = record(tmp_path)["measured"][stage]["flops"]
        assert summary["share_of_peak"] == pytest.approx(10 * flops / summary["seconds"] / record(tmp_path)["peak"])
        assert final[2]["of peak"] == pytest.approx(summary["share_of_peak"]) and flops > 0
