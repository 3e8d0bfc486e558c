"""The benchmark of several conditions: drawings, their measure, the judge, requests, and the table."""

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sfumato.modalities.image.read import read_images
from tests.benchmarks.loading import load_benchmark


@pytest.fixture
def conditions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("conditions", monkeypatch)


def drawings(conditions: ModuleType, count: int = 400) -> Any:
    """Drawings of scikit-learn's digits, enlarged to 28 pixels."""
    digits = read_images("digits")[0]
    assert digits.labels is not None
    pixels = [Image.fromarray(x[..., 0]).resize((20, 20), Image.Resampling.BICUBIC) for x in digits.pixels[:count]]
    return conditions.draw_all(np.stack([np.pad(np.asarray(x), 4) for x in pixels]), digits.labels[:count], seed=0)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_thickness_of_a_bar_is_measured_and_changed(conditions: ModuleType, width: int):
    mask = np.zeros((28 * conditions.SCALE,) * 2, bool)
    mask[5 * conditions.SCALE : 23 * conditions.SCALE, 10 * conditions.SCALE : (10 + width) * conditions.SCALE] = True
    assert conditions.mean_thickness(conditions.border_distance(mask)) == pytest.approx(width, abs=0.35)
    for target in (width - 0.7, width + 0.7):
        image, thickness = conditions.draw(mask, "plain", target)
        assert thickness == pytest.approx(target, abs=0.45)  # round corners have less
        assert image[14].sum() / 255 == pytest.approx(target, abs=0.35)  # the row's ink, in pixels


def test_styles_differ_and_keep_the_glyph(conditions: ModuleType):
    mask = np.zeros((28 * conditions.SCALE,) * 2, bool)
    mask[20:60, 30:45] = True
    plain, inverted, outline, striped = (conditions.draw(mask, style, 5.0)[0] for style in conditions.STYLES)
    assert np.allclose(inverted, 255 - plain) and plain.shape == (28, 28)
    inside, outside = plain == 255, plain == 0
    assert (outline[inside] == 0).all() and outline.max() > 200
    assert (striped[inside] == 255).all() and set(striped[outside].tolist()) == {0, 128}


def test_drawings_are_a_folder_with_a_table(conditions: ModuleType, tmp_path: Path):
    data = drawings(conditions, 60)
    assert all(torch.equal(a, b) for a, b in zip(data, drawings(conditions, 60), strict=True))
    assert data.x.shape == (60, 1, 28, 28) and data.x.min() >= -1 and data.x.max() <= 1
    table = pd.read_csv(conditions.write_folder(tmp_path / "images", data) / "metadata.csv")
    assert list(table) == ["file_name", "digit", "style", "thickness"]
    assert table["digit"].tolist() == data.digit.tolist() and set(table["style"]) == set(conditions.STYLES)
    assert np.allclose(table["thickness"], data.thickness, atol=0.006) and table["thickness"].std() > 0.5
    pixels = np.asarray(Image.open(tmp_path / "images" / table["file_name"][7]))
    assert np.allclose(pixels / 127.5 - 1, data.x[7, 0], atol=0.005)


def test_the_judge_learns_all_three(conditions: ModuleType, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("WIDTH", 8), ("BATCH", 50)):
        monkeypatch.setattr(conditions, name, value)
    data = drawings(conditions, 200)
    scores = conditions.evaluate(conditions.train_judge(data, seed=0, steps=120), data)
    assert scores.style > 0.7 and scores.thickness > 0.5 and scores.digit > 0.25  # chance: .25, 0, .1
    assert scores.both <= min(scores.digit, scores.style)


def test_images_are_judged_by_what_was_requested(conditions: ModuleType):
    class Exact:
        def predict(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return data.digit, data.style, 2 * data.thickness + 1

    data = drawings(conditions, 40)
    assert conditions.evaluate(Exact(), data)[:3] == (1, 1, 1)
    wrong = data._replace(digit=torch.cat([data.digit[:30], (data.digit[30:] + 1) % 10]))
    assert conditions.evaluate(Exact(), wrong) == pytest.approx((0.75, 1, 0.75, 1))


def test_requests_cover_all_combinations(conditions: ModuleType):
    data = drawings(conditions)
    groups = list(conditions.requests(data, seed=0))
    assert len(groups) == 40 * conditions.LEVELS and groups == list(conditions.requests(data, seed=0))
    assert {group[:2] for group in groups} == {(d, s) for d in range(10) for s in range(4)}
    for first in range(0, len(groups), conditions.LEVELS):
        thickness = [group[2] for group in groups[first : first + conditions.LEVELS]]
        assert thickness == sorted(thickness) and thickness[0] < thickness[-1]


def test_the_table_has_the_floor_and_the_bars(conditions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Result:
        def __init__(self, n: int) -> None:
            self.items = torch.rand(n, 1, 28, 28)

    calls: list[list[str]] = []

    def generate(model: str, *, n: int, label: list[str], seed: int) -> Result:
        calls.append(label)
        return Result(n)

    data = drawings(conditions)
    monkeypatch.setattr(conditions, "read_drawings", lambda images, seed: (data, data))
    monkeypatch.setattr(conditions, "WIDTH", 4)
    monkeypatch.setattr(conditions, "train_judge", lambda data, seed: conditions.Judge(3, 1).eval())
    monkeypatch.setattr(conditions, "train_model", lambda drawings, options: tmp_path)
    monkeypatch.setattr(conditions.sfumato, "load", lambda run: "the model")
    monkeypatch.setattr(conditions.sfumato, "generate", generate)
    options = argparse.Namespace(out=tmp_path / "out", images=0, seed=0, count=400, floors=False)
    lines = list(conditions.table(options))
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["held-out", "generated", "required"]
    assert lines[3].split(" | ")[1] == "400" and len(calls) == 200
    assert calls[0][:2] == ["digit=0", "style=plain"] and calls[-1][:2] == ["digit=9", "style=striped"]
    assert calls[0][2].startswith("thickness=")
    assert {path.name for path in options.out.iterdir()} == {"real.png", "generated.png"}
