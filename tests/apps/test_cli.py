"""The command line: flags from signatures, one-line errors, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from sfumato import __version__
from sfumato.apps import cli
from sfumato.errors import UserError
from sfumato.modalities.table.modality import TableModality

seen: dict[str, Any] = {}


def paint(
    model: Path | str,
    source: str,
    *,
    n: int = 64,
    out: Path | str | None = None,
    sampler: Literal["ddim", "heun"] | None = None,
    guidance: float | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    overrides: Sequence[str] = (),
    label: "str | Sequence[str] | None" = None,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Paint.

    Args:
        n: How many.
    """
    seen.clear()
    seen.update(locals())
    if isinstance(error := ERRORS.get(source), BaseException):
        raise error
    return {"painted": n}


ERRORS = {
    "user": UserError("label 'z' is unknown:\nit knows a, b"),
    "data": UserError("3 files cannot be read", code=1),
    "stop": KeyboardInterrupt(),
    "stop early": KeyboardInterrupt("nothing was changed"),
    "full": OSError(28, "No space left on device", "/runs/x"),
    "rust": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "memory": RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    "bug": ZeroDivisionError("float division by zero"),
}


@pytest.fixture
def app() -> click.Command:
    group = click.Group()
    cli.command(group, paint, report=lambda result, values: result, required=("out",))
    return group.commands["paint"]


def invoke(app: click.Command, *words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_flags_come_from_the_signature(app: click.Command):
    words = "m digits --out o -n 3 --sampler ddim --guidance 1.5 --skip-bad --set a.b=1 --set c=d"
    assert invoke(app, *words.split(), "--label", "7", "--label", "style=bold").exit_code == 0
    progress = seen.pop("progress")
    assert callable(progress)
    assert seen == {
        "model": "m",
        "source": "digits",
        "n": 3,
        "out": "o",
        "sampler": "ddim",
        "guidance": 1.5,
        "skip_bad": True,
        "resume": False,
        "overrides": ("a.b=1", "c=d"),
        "label": ("7", "style=bold"),
    }


def test_defaults_come_from_the_signature(app: click.Command):
    assert invoke(app, "m", "digits", "--out", "o").exit_code == 0
    assert (seen["n"], seen["sampler"], seen["guidance"]) == (64, None, None)
    assert (seen["overrides"], seen["label"]) == ((), None)


def test_help_shows_defaults_and_arguments(app: click.Command):
    text = " ".join(invoke(app, "--help").output.split())
    for part in ("MODEL", "SOURCE", "How many. [default: 64]", "--set KEY=VALUE", "--json", "heun"):
        assert part in text


def test_json(app: click.Command):
    assert json.loads(invoke(app, "m", "digits", "--out", "o", "--json").stdout) == {"painted": 64}
    assert invoke(app, "m", "digits", "--out", "o").stdout.split() == ["painted", "64"]


@pytest.mark.parametrize("words", ["m", "m d", "m d --out o --oot p", "m d --out o -n many", "m d --out o --sampler x"])
def test_wrong_usage_exits_with_2(app: click.Command, words: str):
    assert invoke(app, *words.split()).exit_code == 2


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("user", 2, "sfumato: label 'z' is unknown: it knows a, b"),
        ("data", 1, "sfumato: 3 files cannot be read"),
        ("stop", 130, "sfumato: interrupted; continue with: sfumato fit d --out r --resume"),
        ("stop early", 130, "sfumato: interrupted; nothing was changed"),
        ("full", 1, "sfumato: No space left on device: /runs/x"),
        ("rust", 1, "sfumato: No space left on device"),
        ("memory", 1, "sfumato: out of memory"),
        ("bug", 1, "sfumato: internal error: ZeroDivisionError: float division by zero; rerun with SFUMATO_DEBUG=1"),
    ],
)
def test_errors_are_one_line(app: click.Command, monkeypatch: pytest.MonkeyPatch, source: str, code: int, message: str):
    monkeypatch.setattr("sys.argv", ["sfumato", "fit", "d", "--out", "r", "--overwrite"])
    monkeypatch.delenv("SFUMATO_DEBUG", raising=False)
    result = invoke(app, "m", source, "--out", "o")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("channel", ["flag", "variable"])
def test_debug_shows_the_traceback(app: click.Command, monkeypatch: pytest.MonkeyPatch, channel: str):
    if channel == "variable":
        monkeypatch.setenv("SFUMATO_DEBUG", "1")
    result = invoke(app, "m", "bug", "--out", "o", *(["--debug"] if channel == "flag" else []))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "raise error" in result.stderr


def test_other_processes_print_nothing(app: click.Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    result = invoke(app, "m", "digits", "--out", "o")
    assert (result.exit_code, result.output) == (0, "")
    assert seen["progress"].quiet


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["sfumato", *words])
    return cli.run()


def test_a_truncated_file_is_an_error_and_no_crash(tmp_path: Path):
    """The reader's threads may still be running when the program exits."""
    lines = ["a,b,c", *(f"{i},{i % 7},{i % 3}" for i in range(300)), "1,2"]
    (tmp_path / "ragged.csv").write_text("\n".join(lines))
    for _ in range(3):
        words = [sys.executable, "-m", "sfumato", "fit", str(tmp_path / "ragged.csv"), "--out", str(tmp_path / "run")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "line 302 has 2 cells" in done.stderr


def test_usage_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for words in (["fitt"], ["fit"], ["fit", "digits"], ["generate", "m", "--oot", "x"], ["--nonsense"]):
        assert run_main(monkeypatch, *words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("sfumato: ")
        assert captured.err.count("\n") == 1


def test_fit_prints_the_next_command(tmp_path: Path):
    (tmp_path / "model.json").write_text('{"modality": "image"}')
    (tmp_path / "run.json").write_text('{"metrics": {"psnr": {"value": 25.0, "floor": 30.0}}}')
    report = cli._model_report(SimpleNamespace(modality=TableModality()), {"out": tmp_path})
    assert report["next"] == f"sfumato generate {tmp_path} --out samples.csv"
    assert report["metrics"]["psnr"]["value"] == 25.0


def test_exit_codes_reach_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run_main(monkeypatch, "info", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("sfumato: no model in")
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"sfumato {__version__}\n"
    assert run_main(monkeypatch) == 0
    assert "Commands:" in capsys.readouterr().out
