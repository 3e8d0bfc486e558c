"""Reconstruction: reading, selecting, measuring and writing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.modalities.image.metrics import psnr, ssim
from sfumato.modalities.image.read import read_images, read_source
from sfumato.modalities.image.write import to_pixels, write_images
from sfumato.model import Model
from sfumato.tasks.reconstruct import reconstruct
from sfumato.types import Items


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits in folders by class."""
    root, (data, _) = tmp_path_factory.mktemp("pictures"), read_images("digits")
    for i in range(40):
        folder = root / data.label_names[data.labels[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(data.pixels[i, ..., 0]).save(folder / f"{i:02}.png")
    return root


def test_reconstructions_and_metrics(model: Model, pictures: Path, tmp_path: Path):
    reports: list[tuple] = []
    result = reconstruct(
        model, pictures, out=tmp_path / "out", batch=7, progress=lambda *report: reports.append(report)
    )
    data, _ = read_images(pictures)
    x = data.batch(range(40)).data
    x_hat = model.autoencode(x).stack().clamp(-1, 1)
    assert torch.allclose(result.items.stack(), x_hat, atol=1e-5)
    assert [row["source"] for row in result.metadata] == data.names
    assert [row["label"] for row in result.metadata] == [int(name[0]) for name in data.names]
    expected = [psnr(x[i : i + 1], x_hat[i : i + 1]) for i in range(40)]
    assert np.allclose([row["psnr"] for row in result.metadata], expected, atol=1e-3) and np.std(expected) > 0.01
    summary = result.summary()
    assert summary["items"] == 40
    assert abs(summary["psnr"] - psnr(x, x_hat)) < 1e-2 and abs(summary["ssim"] - ssim(x, x_hat)) < 1e-4
    assert reports[-1] == ("reconstruct", 40, 40)


def test_written_items_are_read_back(model: Model, pictures: Path, tmp_path: Path):
    result = reconstruct(model, pictures, out=tmp_path / "out")
    data, _ = read_images(tmp_path / "out")
    assert (data.pixels == to_pixels(result.items.stack(), "L")).all() and data.label_names == [
        str(k) for k in range(10)
    ]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[3]["source"] == result.metadata[3]["source"] and rows[3]["file_name"] == "000003.png"
    with Image.open(tmp_path / "out-sheet.png") as sheet:
        assert sheet.width > sheet.height > 0
    reconstruct(model, pictures, n=2, out=tmp_path / "two", sheet=tmp_path / "named.png")
    assert (tmp_path / "named.png").is_file() and not (tmp_path / "two-sheet.png").exists()


def test_the_sheet_shows_evenly_spaced_pairs(
    model: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def preview(x: Items, spec: str, x_hat: Items) -> Image.Image:
        shown.append((x.stack(), x_hat.stack()))
        return Image.new("L", (1, 1))

    monkeypatch.setattr(model.modality, "preview", preview)
    x = read_images(pictures)[0].batch(range(40)).data
    for batch in (7, 40):
        items = reconstruct(model, pictures, sheet=tmp_path / "pairs.png", batch=batch, overwrite=True).items.stack()
        assert torch.equal(shown[-1][0], x[::2]) and torch.equal(shown[-1][1], items[::2])


def test_held_out_items_come_first(model: Model):
    train, held_out = read_source("digits")
    few = reconstruct(model, "digits", n=20)
    x_hat = model.autoencode(held_out.batch(range(len(held_out))).data).stack()
    gap = (few.items.stack()[:, None] - x_hat).abs().flatten(2).amax(2).min(1)
    assert gap.values.max() < 1e-4 and len(gap.indices.unique()) == 20
    assert len({row["label"] for row in few.metadata}) > 3  # a random choice, not the first files
    more = reconstruct(model, "digits", n=len(held_out) + 5)
    assert len(more.items) == len(held_out) + 5
    assert len(reconstruct(model, "digits", n=10**6).items) == len(train) + len(held_out)
    assert not torch.equal(reconstruct(model, "digits", n=20, seed=1).items.stack(), few.items.stack())


def test_images_that_do_not_fit_the_model(model: Model, tmp_path: Path):
    write_images(tmp_path / "colour", torch.rand(3, 3, 12, 10) * 2 - 1)
    with pytest.raises(
        UserError, match=r"the model: its images are 8x8 L, but those of .*colour are 10x12 RGB"
    ) as error:
        reconstruct(model, tmp_path / "colour", out=tmp_path / "out")
    assert error.value.code == 1 and not (tmp_path / "out").exists()
    assert "--set data.resolution=8 --set data.mode=L" in str(error.value)
    converted = reconstruct(model, tmp_path / "colour", overrides=["data.resolution=8", "data.mode=L"])
    assert converted.items.stack().shape == (3, 1, 8, 8)


def test_a_source_is_read_as_the_run_read_its_own(run: Path, tmp_path: Path):
    write_images(tmp_path / "colour", torch.rand(3, 3, 12, 10) * 2 - 1)
    result = reconstruct(run, tmp_path / "colour")  # 8 pixels and L are recorded in run.json
    assert (
        result.items.stack().shape == (3, 1, 8, 8)
        and [set(row) for row in result.metadata] == [{"source", "psnr", "ssim", "l1"}] * 3
    )


def test_captions_and_one_image(make_model: Callable[..., Model], tmp_path: Path):
    write_images(tmp_path / "one", torch.rand(1, 3, 8, 8) * 2 - 1, [{"text": "a dot"}])
    result = reconstruct(make_model(0, (3, 8, 8), "RGB"), tmp_path / "one", out=tmp_path / "out", n=5)
    assert [row["text"] for row in result.metadata] == ["a dot"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "-n must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"overrides": ["codec.width=8"]}, "only data settings can be set here"),
        ({"overrides": ["data.resolutoin=8"]}, "data.resolution"),
    ],
)
def test_wrong_settings(model: Model, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        reconstruct(model, "digits", **settings)
    assert error.value.code == 2


def test_bad_paths(model: Model, pictures: Path, tmp_path: Path):
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
