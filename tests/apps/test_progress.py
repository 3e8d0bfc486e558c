"""The progress bar and its lines."""

import pytest

from sfumato.apps.progress import ProgressLine, format_seconds, format_values


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (75, "1:15"), (59.7, "1:00"), (3700, "1:01:40")])
def test_seconds(seconds: float, text: str):
    assert format_seconds(seconds) == text


def test_values():
    assert format_values({"eta": 75, "loss": 0.12344, "items/s": 1890.2}) == "eta 1:15  loss 0.1234  1890 items/s"
    assert (
        format_values({"loss": 12.0, "items/s": 0.51234, "of peak": 0.317}) == "loss 12  0.5123 items/s  32 % of peak"
    )
    assert format_values({"of peak": 0.00414}) == "0.41 % of peak"
    whole = {"steps": 1234, "items": 78976, "took": 64.2, "items/s": 1230.0, "of peak": 0.25}
    assert format_values(whole) == "1,234 steps  78,976 items  took 1:04  1230 items/s  25 % of peak"


def test_lines_when_piped(capsys: pytest.CaptureFixture[str]):
    """A line when a stage starts and ends, none for each step; and on the error stream only."""
    with ProgressLine() as progress:
        for step in range(1, 101):
            progress("codec", step, 100, {"loss": 0.5})
        progress("denoiser", 0, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split()[:2] for line in lines] == [["codec", "1"], ["codec", "100"], ["denoiser", "0"]]
    assert lines[1].endswith("loss 0.5")


def test_quiet(capsys: pytest.CaptureFixture[str]):
    with ProgressLine(quiet=True) as progress:
        progress("codec", 1, 2)
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]):
    with ProgressLine() as progress:
        progress.interactive = True
        progress("codec", 1, 2, {"loss": 0.5})
        progress("codec", 2, 2, {"loss": 0.25})
        progress("denoiser", 1, 4)
        assert len(progress.bar.tasks) == 2
        assert progress.bar.tasks[0].finished
    assert "denoiser" in capsys.readouterr().err
