"""Images through the codec and back: what is read, chosen, measured and written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import read_images, read_source, write_images
from sfumato.data.write import to_pixels
from sfumato.errors import UserError
from sfumato.metrics import psnr, ssim
from sfumato.model import Model
from sfumato.tasks.reconstruct import reconstruct


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits in folders by class."""
    root, (data, _) = tmp_path_factory.mktemp("pictures"), read_images("digits")
    for i in range(40):
        folder = root / data.label_names[data.labels[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(data.pixels[i, ..., 0]).save(folder / f"{i:02}.png")
    return root


def test_what_comes_back(model: Model, pictures: Path, tmp_path: Path):
    told: list[tuple] = []
    result = reconstruct(model, pictures, out=tmp_path / "out", batch=7, progress=lambda *facts: told.append(facts))
    data, _ = read_images(pictures)
    x = data.batch(range(40)).data
    x_hat = model.autoencode(x).clamp(-1, 1)
    assert torch.allclose(result.items, x_hat, atol=1e-5)
    assert [row["source"] for row in result.rows] == data.names
    assert [row["label"] for row in result.rows] == [int(name[0]) for name in data.names]
    each = [psnr(x[i : i + 1], x_hat[i : i + 1]) for i in range(40)]
    assert np.allclose([row["psnr"] for row in result.rows], each, atol=1e-3) and np.std(each) > 0.01
    summary = result.summary()
    assert summary["items"] == 40
    assert abs(summary["psnr"] - psnr(x, x_hat)) < 1e-2 and abs(summary["ssim"] - ssim(x, x_hat)) < 1e-4
    assert told[-1] == ("reconstruct", 40, 40)


def test_what_is_written_is_read_again(model: Model, pictures: Path, tmp_path: Path):
    result = reconstruct(model, pictures, out=tmp_path / "out")
    data, _ = read_images(tmp_path / "out")
    assert (data.pixels == to_pixels(result.items, "L")).all() and data.label_names == [str(k) for k in range(10)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[3]["source"] == result.rows[3]["source"] and rows[3]["file_name"] == "000003.png"
    with Image.open(tmp_path / "out-sheet.png") as sheet:
        assert sheet.width > sheet.height > 0
    reconstruct(model, pictures, n=2, out=tmp_path / "two", sheet=tmp_path / "named.png")
    assert (tmp_path / "named.png").is_file() and not (tmp_path / "two-sheet.png").exists()


def test_the_sheet_shows_pairs_from_all_over(
    model: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pairs(x: torch.Tensor, x_hat: torch.Tensor, mode: str) -> Image.Image:
        shown.append((x, x_hat))
        return Image.new("L", (1, 1))

    monkeypatch.setattr(model, "modality", replace(model.modality, pairs=pairs))
    x = read_images(pictures)[0].batch(range(40)).data
    for batch in (7, 40):
        items = reconstruct(model, pictures, sheet=tmp_path / "pairs.png", batch=batch, overwrite=True).items
        assert torch.equal(shown[-1][0], x[::2]) and torch.equal(shown[-1][1], items[::2])


def test_held_out_items_come_first(model: Model):
    train, held = read_source("digits")
    few = reconstruct(model, "digits", n=20)
    of_held = model.autoencode(held.batch(range(len(held))).data)
    away = (few.items[:, None] - of_held).abs().flatten(2).amax(2).min(1)
    assert away.values.max() < 1e-4 and len(away.indices.unique()) == 20
    assert len({row["label"] for row in few.rows}) > 3  # not the first ones of the files
    more = reconstruct(model, "digits", n=len(held) + 5)
    assert len(more.items) == len(held) + 5
    assert len(reconstruct(model, "digits", n=10**6).items) == len(train) + len(held)
    assert not torch.equal(reconstruct(model, "digits", n=20, seed=1).items, few.items)


def test_other_images_than_the_models(model: Model, tmp_path: Path):
    write_images(tmp_path / "colour", torch.rand(3, 3, 12, 10) * 2 - 1)
    with pytest.raises(
        UserError, match=r"the model: its images are 8x8 L, but those of .*colour are 10x12 RGB"
    ) as told:
        reconstruct(model, tmp_path / "colour", out=tmp_path / "out")
    assert told.value.code == 1 and not (tmp_path / "out").exists()
    assert "--set data.resolution=8 --set data.mode=L" in str(told.value)
    mended = reconstruct(model, tmp_path / "colour", overrides=["data.resolution=8", "data.mode=L"])
    assert mended.items.shape == (3, 1, 8, 8)


def test_a_source_is_read_as_the_run_read_its_own(run: Path, tmp_path: Path):
    write_images(tmp_path / "colour", torch.rand(3, 3, 12, 10) * 2 - 1)
    result = reconstruct(run, tmp_path / "colour")  # 8 pixels and L stand in run.json
    assert (
        result.items.shape == (3, 1, 8, 8)
        and [set(row) for row in result.rows] == [{"source", "psnr", "ssim", "l1"}] * 3
    )


def test_captions_and_one_image(make_model: Callable[..., Model], tmp_path: Path):
    write_images(tmp_path / "one", torch.rand(1, 3, 8, 8) * 2 - 1, [{"text": "a dot"}])
    result = reconstruct(make_model(0, (3, 8, 8), "RGB"), tmp_path / "one", out=tmp_path / "out", n=5)
    assert [row["text"] for row in result.rows] == ["a dot"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "-n must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"overrides": ["codec.width=8"]}, "only how the data are read"),
        ({"overrides": ["data.resolutoin=8"]}, "data.resolution"),
    ],
)
def test_wrong_settings(model: Model, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as told:
        reconstruct(model, "digits", **settings)
    assert told.value.code == 2


def test_bad_places(model: Model, pictures: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images here"):
        reconstruct(model, tmp_path / "empty")
    with pytest.raises(UserError, match="no model in"):
        reconstruct(tmp_path / "empty", pictures)
    reconstruct(model, pictures, n=2, out=tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        reconstruct(model, pictures, n=2, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"out-sheet\.png: exists"):
        (tmp_path / "out").rename(tmp_path / "moved")
        reconstruct(model, pictures, n=2, out=tmp_path / "out")
    reconstruct(model, pictures, n=3, out=tmp_path / "moved", overwrite=True)
    assert len(read_images(tmp_path / "moved")[0]) == 3
