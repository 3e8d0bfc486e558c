"""The commands that change given items, as typed: what is printed, where it lands, and what a mistake costs."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sfumato.apps import cli
from sfumato.data import read_images, write_images


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two digits, `in`, and two masks."""
    place = tmp_path_factory.mktemp("place")
    data = read_images("digits")[0]
    write_images(place / "in", data.batch([0, 1]).data, [{"label": 0}, {"label": 1}])
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(place / "mask.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(place / "tall.png")
    return place


def invoke(run: Path, place: Path, line: str) -> tuple[int, str, str]:
    """Exit code and what was printed; RUN and PLACE stand for folders."""
    words = [word.replace("PLACE", str(place)).replace("RUN", str(run)) for word in line.split()]
    done = CliRunner().invoke(cli.app, [*words, "--quiet", "--device", "cpu"])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("edit RUN PLACE/in --out PLACE/1 --label 7 --strength 0.4", 2),
        ("edit RUN PLACE/in/000001.png --out PLACE/2 --method invert --steps 3 --own-label 1 --label 7", 1),
        ("inpaint RUN PLACE/in --mask PLACE/mask.png --out PLACE/3 --steps 2", 2),
        ("outpaint RUN PLACE/in --left 3 --bottom 5 --out PLACE/8 --steps 2", 2),
        ("inpaint RUN PLACE/in --mask PLACE/mask.png --invert-mask --method repaint --out PLACE/4 --steps 2", 2),
        ("interpolate RUN --out PLACE/5 -n 3", 3),
        (
            "interpolate RUN PLACE/in/000001.png 4 --out PLACE/6 -n 2 --steps 3 --path latent --animation PLACE/6.webp",
            2,
        ),
    ],
)
def test_what_one_command_writes_the_next_one_reads(run: Path, place: Path, line: str, count: int):
    code, out, error = invoke(run, place, line + " --json")
    assert (code, error) == (0, "")
    told = json.loads(out)
    assert told["items"] == count and len(read_images(told["out"])[0]) == count
    code, out, error = invoke(run, place, f"edit RUN {told['out']} --strength 0 --out {told['out']}-again")
    assert code == 0, error


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("edit RUN PLACE/in --out PLACE/x --strength 2", 2, "strength must be between 0 and 1, not 2"),
        ("edit RUN PLACE/in --out PLACE/x --label zebra", 2, "label 'zebra' is unknown"),
        ("edit RUN PLACE/nothing --out PLACE/x", 2, "PLACE/nothing: no such file"),
        ("inpaint RUN PLACE/in --mask PLACE/tall.png --out PLACE/x", 1, "PLACE/tall.png: the mask tall.png is 8x9"),
        ("outpaint RUN PLACE/in --out PLACE/x", 2, "nothing to add: say how many pixels with --left"),
        ("outpaint RUN PLACE/in --left -1 --out PLACE/x", 2, "--left must be at least 0, not -1"),
        ("inpaint RUN PLACE/in --mask PLACE/none.png --out PLACE/x", 2, "PLACE/none.png: no such mask"),
        ("interpolate RUN 0 PLACE/in --out PLACE/x", 1, "PLACE/in: holds 2 items"),
        ("interpolate RUN --out PLACE/x --animation x.avi", 2, "x.avi: an animation's name"),
        ("interpolate PLACE/in --out PLACE/x", 2, "no model in"),
    ],
)
def test_mistakes_are_one_line(run: Path, place: Path, line: str, code: int, said: str):
    found, out, error = invoke(run, place, line)
    assert (found, out, error.count("\n")) == (code, "", 1)
    assert error.startswith("sfumato: " + said.replace("PLACE", str(place))) and not (place / "x").exists()


def test_what_must_be_said(run: Path, place: Path):
    for line in (
        "edit RUN PLACE/in",
        "interpolate RUN",
        "inpaint RUN PLACE/in --out PLACE/x",
        "edit RUN --out PLACE/x",
    ):
        assert invoke(run, place, line)[0] == 2
