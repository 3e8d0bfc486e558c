"""The tasks as commands: what is printed and written, and errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sfumato.apps import cli
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two digits, `in`, and two masks."""
    folder = tmp_path_factory.mktemp("folder")
    data = read_images("digits")[0]
    write_images(folder / "in", data.batch([0, 1]).data, [{"label": 0}, {"label": 1}])
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "mask.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "tall.png")
    return folder


def invoke(run: Path, folder: Path, line: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command; RUN and DIR stand for folders."""
    words = [word.replace("DIR", str(folder)).replace("RUN", str(run)) for word in line.split()]
    done = CliRunner().invoke(cli.app, [*words, "--quiet", "--device", "cpu"])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("edit RUN DIR/in --out DIR/1 --label 7 --strength 0.4", 2),
        ("edit RUN DIR/in/000001.png --out DIR/2 --method invert --steps 3 --source-label 1 --label 7", 1),
        ("inpaint RUN DIR/in --mask DIR/mask.png --out DIR/3 --steps 2", 2),
        ("outpaint RUN DIR/in --left 3 --bottom 5 --out DIR/8 --steps 2", 2),
        ("inpaint RUN DIR/in --mask DIR/mask.png --invert-mask --method repaint --out DIR/4 --steps 2", 2),
        ("interpolate RUN --out DIR/5 -n 3", 3),
        (
            "interpolate RUN DIR/in/000001.png 4 --out DIR/6 -n 2 --steps 3 --path latent --animation DIR/6.webp",
            2,
        ),
    ],
)
def test_one_command_reads_the_output_of_another(run: Path, folder: Path, line: str, count: int):
    code, out, error = invoke(run, folder, line + " --json")
    assert (code, error) == (0, "")
    report = json.loads(out)
    assert report["items"] == count and len(read_images(report["out"])[0]) == count
    code, out, error = invoke(run, folder, f"edit RUN {report['out']} --strength 0 --out {report['out']}-again")
    assert code == 0, error


def test_several_conditions(portraits_run: Path, folder: Path):
    given = "--label digit=7 --label style=bold --label age=30"
    for line, shared in (
        ("generate RUN -n 2 --out DIR/p", {"digit": 7, "style": "bold", "age": 30.0}),
        ("edit RUN DIR/p --out DIR/q --method invert --steps 3 --guidance 1", {"source_digit": 7}),
        ("edit RUN DIR/in --out DIR/r --strength 0.4", {"digit": 7, "style": "bold", "age": 30.0}),
    ):
        options = "" if "invert" in line else given
        code, _, error = invoke(portraits_run, folder, f"{line} {options}")
        assert code == 0, error
        out = folder / line.split()[line.split().index("--out") + 1].removeprefix("DIR/")
        rows = [json.loads(row) for row in (out / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and all(shared.items() <= row.items() for row in rows), rows
        assert all({"digit", "style", "age"} <= row.keys() and "source_age" not in row for row in rows)
    code, _, error = invoke(portraits_run, folder, "generate RUN --out DIR/s --label style=italic")
    assert (code, error.count("\n")) == (2, 1) and error.startswith("sfumato: style 'italic' is unknown")


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("edit RUN DIR/in --out DIR/x --strength 2", 2, "strength must be between 0 and 1, not 2"),
        ("edit RUN DIR/in --out DIR/x --label zebra", 2, "label 'zebra' is unknown"),
        ("edit RUN DIR/nothing --out DIR/x", 2, "DIR/nothing: no such file"),
        ("inpaint RUN DIR/in --mask DIR/tall.png --out DIR/x", 1, "DIR/tall.png: the mask tall.png is 8x9"),
        ("outpaint RUN DIR/in --out DIR/x", 2, "nothing to add: give a number of pixels with --left"),
        ("outpaint RUN DIR/in --left -1 --out DIR/x", 2, "--left must be at least 0, not -1"),
        ("inpaint RUN DIR/in --mask DIR/none.png --out DIR/x", 2, "DIR/none.png: no such mask"),
        ("interpolate RUN 0 DIR/in --out DIR/x", 1, "DIR/in: holds 2 items"),
        ("interpolate RUN --out DIR/x --animation x.avi", 2, "x.avi: an animation's name"),
        ("interpolate DIR/in --out DIR/x", 2, "no model in"),
    ],
)
def test_mistakes_are_one_line(run: Path, folder: Path, line: str, code: int, message: str):
    found, out, error = invoke(run, folder, line)
    assert (found, out, error.count("\n")) == (code, "", 1)
    assert error.startswith("sfumato: " + message.replace("DIR", str(folder))) and not (folder / "x").exists()


def test_required_arguments(run: Path, folder: Path):
    for line in (
        "edit RUN DIR/in",
        "interpolate RUN",
        "inpaint RUN DIR/in --out DIR/x",
        "edit RUN --out DIR/x",
    ):
        assert invoke(run, folder, line)[0] == 2
