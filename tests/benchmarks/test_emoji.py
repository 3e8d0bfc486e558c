"""The benchmark of emoji: disjoint captions for training and test, retrieval, and the sheet."""

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.types import Items
from tests.benchmarks.loading import load_benchmark


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("emoji", monkeypatch)


@pytest.fixture
def data(emoji: ModuleType, tmp_path: Path) -> Path:
    """Two sets: red encodes the caption, size and blue the set."""
    for k, (folder, side) in enumerate(zip(emoji.STYLES.values(), (64, 128), strict=True)):
        (tmp_path / folder / "images").mkdir(parents=True)
        rows = []
        for i in range(40 + 5 * (1 - k)):  # the first set has a few more captions
            Image.new("RGB", (side, side), (5 * i, 0, 100 * k)).save(tmp_path / folder / "images" / f"{i}.png")
            rows.append(json.dumps({"file_name": f"images/{i}.png", "text": f"caption {i}"}))
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_captions_of_styles_and_test_are_disjoint(emoji: ModuleType, data: Path):
    split = emoji.read(data, test=10)
    captions = {s: set(split.train[s][:, 0, 0, 0].tolist()) for s in emoji.STYLES}
    tested = {s: split.test[s][:, 0, 0, 0].tolist() for s in emoji.STYLES}
    assert tested["noto"] == tested["fluent"] and len(set(tested["noto"])) == 10
    assert not captions["noto"] & captions["fluent"] and not (captions["noto"] | captions["fluent"]) & {*tested["noto"]}
    assert [len(captions[s]) for s in emoji.STYLES] == [15, 15]
    assert {x.shape[1:] for part in split for x in part.values()} == {(64, 64, 3)}
    assert (split.train["fluent"][..., 2] == 100).all() and (split.test["noto"][..., 2] == 0).all()


def test_retrieval_counts_own_nearest_neighbours(emoji: ModuleType):
    truth = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert emoji.retrieval(truth + 0.3, truth) == 1.0
    assert emoji.retrieval(truth.flip(0), truth) == 0.0


def test_the_sheet_has_four_rows(emoji: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Result:
        def __init__(self, items: torch.Tensor) -> None:
            self.items = Items(items)

    edits = []

    def edit(run: Path, given: Path, label: str, strength: float) -> Result:
        edits.append((label, strength))
        return Result(torch.full((10, 3, 64, 64), 10 * abs(strength - 0.5)))

    monkeypatch.setattr(emoji, "STEPS", 2)
    monkeypatch.setattr(emoji, "train_model", lambda split, options: tmp_path)
    monkeypatch.setattr(emoji.sfumato, "edit", edit)
    monkeypatch.setattr(emoji.sfumato, "reconstruct", lambda *_: Result(torch.ones(10, 3, 64, 64)))
    monkeypatch.setattr(emoji.sfumato, "transfer", lambda *_, budget, **options: Result(torch.zeros(10, 3, 64, 64)))
    options = argparse.Namespace(data=data, items=10, out=tmp_path / "out", search="3m")
    lines = list(emoji.table(options))
    assert {label for label, _ in edits} == {"fluent"} and len(edits) == 8
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        *("transfer", "edit at 0.5", "nothing", "coded", "truth")
    ]
    assert lines[-1].endswith("| inf |") or float(lines[-1].split(" | ")[-1].strip("| ")) > 60
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape[0] / sheet.shape[1] == pytest.approx(4 / 10, abs=0.05)
