"""Inpainting: kept pixels stay exactly the same, new ones fit, and masks are read as users draw them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.modalities.base import Modality
from sfumato.modalities.image import masks
from sfumato.modalities.image.codec import ImageCodec
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import encode_png, write_images
from sfumato.model import Model
from sfumato.storage import ModelConfig
from sfumato.tasks.inpaint import fill_masked, inpaint
from sfumato.tasks.outpaint import outpaint
from sfumato.types import Items, Latent

CLOSE = {"atol": 1e-4, "rtol": 0.0}
QUICK = {"steps": 3, "resample": 2}
MODES = {"L": (1, np.uint8), "RGB": (3, np.uint8), "RGBA": (4, np.uint8), "I;16": (1, np.uint16)}


def pixels(shape: tuple[int, ...], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def folder_of(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        (path / f"{i}.png").write_bytes(encode_png(image))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("six") / "six", pixels((6, 8, 8, 1)))


@pytest.fixture(scope="module")
def hole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask file whose white part covers two of the latent's four positions partly."""
    return save(tmp_path_factory.mktemp("mask") / "hole.png", HOLE)


def save(path: Path, mask: np.ndarray) -> Path:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


HOLE = np.zeros((8, 8), bool)
HOLE[2:7, 1:3] = True


@pytest.mark.parametrize("method", ["gradient", "repaint"])
@pytest.mark.parametrize("mode", MODES)
def test_black_pixels_stay_exactly_the_same(
    make_model: Callable[..., Model], hole: Path, tmp_path: Path, mode: str, method: str
):
    channels, dtype = MODES[mode]
    images = pixels((3, 8, 8, channels), dtype)
    model = make_model(0, (channels, 8, 8), mode)
    inpaint(
        model, folder_of(tmp_path / "in", images), mask=hole, out=tmp_path / "out", method=method, steps=2, resample=1
    )
    data, _ = read_images(tmp_path / "out")
    assert data.spec == mode and data.pixels.dtype == dtype
    assert np.array_equal(data.pixels[:, ~HOLE], images[:, ~HOLE])
    assert (data.pixels[:, HOLE] != images[:, HOLE]).mean() > 0.5


def test_every_16_bit_value_survives(make_model: Callable[..., Model], tmp_path: Path):
    images = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256, 1)
    mask = np.zeros((256, 256), bool)
    mask[0, 0] = True
    source = folder_of(tmp_path / "in", images)
    model = make_model(0, (1, 256, 256), "I;16")
    result = inpaint(model, source, mask=save(tmp_path / "mask.png", mask), out=tmp_path / "out", steps=1, resample=1)
    out = read_images(tmp_path / "out")[0].pixels
    assert (
        np.array_equal(out.ravel()[1:], images.ravel()[1:]) and abs(result.statistics["repainted"] * 65536 - 1) < 1e-3
    )


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_an_item_does_not_depend_on_its_batch(model: Model, source: Path, hole: Path, method: str):
    whole, parts = (inpaint(model, source, mask=hole, method=method, batch=n, **QUICK).items.stack() for n in (64, 4))
    assert torch.allclose(whole, parts, **CLOSE)
    inside = torch.from_numpy(HOLE)
    assert len(whole[:, 0, inside].unique(dim=0)) == 6
    other = inpaint(model, source, mask=hole, method=method, seed=1, **QUICK).items.stack()
    assert not torch.allclose(whole[:, 0, inside], other[:, 0, inside], atol=1e-2)


def test_noise_differs_from_that_of_generate(model: Model, source: Path, tmp_path: Path):
    white = save(tmp_path / "mask.png", np.ones((8, 8), bool))
    inpainted = inpaint(model, source, mask=white, method="repaint", steps=1, resample=1, guidance=1.0).items.stack()
    new = model.sample(range(6), sampling=replace(model.sampling, sampler="ddpm", steps=1, guidance=1.0))
    assert not torch.allclose(inpainted, model.decode(new).stack(), atol=1e-2)


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_masked_pixels_have_no_influence(model: Model, tmp_path: Path, method: str):
    images = pixels((3, 8, 8, 1))
    mask = np.zeros((8, 8), bool)
    mask[4:] = True  # two of four positions, next to kept ones
    results: list[torch.Tensor] = []
    for name, hidden in {"black": 0, "white": 255, "noise": pixels((3, 8, 8, 1), seed=1)}.items():
        folder = folder_of(tmp_path / name, np.where(mask[..., None], hidden, images).astype(np.uint8))
        mask_file = save(tmp_path / "mask.png", mask)
        results.append(inpaint(model, folder, mask=mask_file, method=method, **QUICK).items.stack())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_masked_pixels_take_the_value_of_the_nearest_kept_one():
    x = torch.arange(1.0, 33).reshape(1, 2, 4, 4).repeat(2, 1, 1, 1)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1:3] = mask[1] = True
    filled = fill_masked(x, mask)
    assert torch.equal(filled[0], x[0, :, [0, 0, 3, 3]]) and not filled[1].any()
    rows = torch.tensor([[1.0, torch.nan, 3.0]])
    assert fill_masked(rows, rows.isnan()).tolist() == [[1.0, 0.0, 3.0]]


def lossless(config: ModelConfig) -> Model:
    """A model whose latents are the pixels of 4x4 patches."""
    model = Model(replace(config, codec={"shape": [1, 8, 8], "downsample": 4, "channels": 16, "bottleneck": "none"}))
    with torch.no_grad():
        for patch in (model.codec.encoder.patch, model.codec.decoder.patch):
            patch.weight.copy_(torch.eye(16).view(16, 1, 4, 4))
            patch.bias.zero_()
    return model.eval()


def test_the_gradient_uses_kept_pixels_of_partly_masked_positions(
    make_model: Callable[..., Model], source: Path, hole: Path, monkeypatch: pytest.MonkeyPatch
):
    """All four positions are partly masked: none can be replaced, but three quarters of the pixels are kept."""
    model, decoded = lossless(make_model(0).config), {}
    x, kept = read_images(source)[0].batch(range(6)).data, ~torch.from_numpy(np.roll(HOLE, 2, 1))
    assert torch.allclose(model.autoencode(x).stack(), x, atol=1e-5)
    mask = save(hole.with_name("middle.png"), ~kept.numpy())
    decode = Model.decode
    for method in ("gradient", "repaint"):
        record = lambda self, z, m=method: decoded.setdefault(m, decode(self, z)) if len(z) == 6 else None
        with monkeypatch.context() as patch:
            patch.setattr(Model, "decode", record)
            patch.setattr(Model, "autoencode", lambda self, x: Items(x))
            inpaint(model, source, mask=mask, method=method, steps=10, resample=1)
    error = {m: float((items.stack() - x)[:, 0, kept].square().mean().sqrt()) for m, items in decoded.items()}
    assert error["gradient"] < 0.05 and error["repaint"] > 0.5, error


@pytest.mark.parametrize("bottleneck", ["vq", "fsq"])
def test_decoding_of_unquantized_codes_has_a_gradient(bottleneck: str):
    codec = ImageCodec((1, 8, 8), downsample=4, width=16, bottleneck=bottleneck).eval()
    z = torch.randn(2, *codec.latent_shape).requires_grad_()
    (gradient,) = torch.autograd.grad(codec.decode_unquantized(z).square().sum(), z)
    assert (gradient != 0).float().mean() > 0.9
    code = codec.encode(torch.rand(2, 1, 8, 8)).z
    decoded = codec.decode(Latent(code))
    assert torch.allclose(codec.decode_unquantized(code), decoded, atol=1e-5)  # a code is quantized already


def test_unmasked_positions_have_no_masked_pixel(make_model: Callable[..., Model]):
    codec = make_model(0, (1, 9, 8)).codec  # 3 x 2 positions, the last row of one pixel
    mask = torch.zeros(2, 9, 8, dtype=torch.bool)
    mask[0, 3, 4] = mask[1, 8, 0] = True
    kept = codec.unmasked(mask)
    assert kept.shape == (2, 1, 3, 2)
    assert (~kept[0, 0]).nonzero().tolist() == [[0, 1]] and (~kept[1, 0]).nonzero().tolist() == [[2, 0]]
    vector = type(codec)((1, 9, 8), downsample=4, latent_dim=5, width=16)
    assert vector.unmasked(torch.stack([mask[0], mask[0] & False])).tolist() == [[False], [True]]


def test_masks_by_name_and_inverted(model: Model, source: Path, tmp_path: Path):
    (tmp_path / "masks").mkdir()
    masks = [np.roll(HOLE, i, 1) for i in range(6)]
    for i, mask in enumerate(masks):
        save(tmp_path / "masks" / f"{i}.bmp", mask)
    before = read_images(source)[0].batch(range(6)).data[:, 0]
    for invert in (False, True):
        items = inpaint(model, source, mask=tmp_path / "masks", invert_mask=invert, **QUICK).items.stack()[:, 0]
        changed, clipped = (items != before).numpy(), (before.abs() == 1).numpy()  # clipped pixels may repeat
        for now, end, mask in zip(changed, clipped, masks, strict=True):
            assert not now[mask if invert else ~mask].any() and (now | end)[~mask if invert else mask].mean() > 0.9
    (tmp_path / "masks" / "4.bmp").unlink()
    with pytest.raises(UserError, match=r"masks: no mask for 4\.png"):
        inpaint(model, source, mask=tmp_path / "masks")


def test_all_black_and_all_white_masks(model: Model, source: Path, tmp_path: Path):
    x = read_images(source)[0].batch(range(6)).data
    for method in ("gradient", "repaint"):
        masks = (save(tmp_path / "m.png", np.full((8, 8), white)) for white in (False, True))
        none, whole = (inpaint(model, source, mask=mask, method=method, **QUICK).items.stack() for mask in masks)
        assert torch.equal(none, x) and torch.isfinite(whole).all() and (whole != x).float().mean() > 0.9


def test_a_mask_of_the_files_size_is_cropped_as_the_image_was(model: Model, tmp_path: Path):
    images = folder_of(tmp_path / "large", pixels((2, 24, 16, 1)))
    mask = np.zeros((24, 16), bool)
    mask[4:12] = True  # the upper half of the middle square
    settings = {"overrides": ["data.resolution=8"], **QUICK}
    items = inpaint(model, images, mask=save(tmp_path / "m.png", mask), **settings).items.stack()[:, 0]
    before = read_images(images, resolution=8)[0].batch(range(2)).data[:, 0]
    assert torch.equal(items[:, 4:], before[:, 4:]) and (items[:, :4] != before[:, :4]).float().mean() > 0.9
    small = np.zeros((8, 8), bool)
    small[:4] = True
    again = inpaint(model, images, mask=save(tmp_path / "s.png", small), **settings).items.stack()[:, 0]
    assert torch.equal(again, items)
    with pytest.raises(UserError, match=r"mask o\.png is 16x20; its image is 8x8 \(its file 16x24\)"):
        inpaint(model, images, mask=save(tmp_path / "o.png", np.zeros((20, 16), bool)), **settings)


def test_the_source_is_opened_once_for_all_masks(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, opened = folder_of(tmp_path / "large", pixels((5, 16, 16, 1))), []
    mask = save(tmp_path / "m.png", np.ones((16, 16), bool))
    image_files = masks.image_files
    monkeypatch.setattr(masks, "image_files", lambda path: opened.append(path) or image_files(path))
    inpaint(model, images, mask=mask, overrides=["data.resolution=8"], **QUICK)
    assert opened == [mask, images]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16"])
def test_white_strokes_on_transparency_and_other_image_modes_of_masks(
    model: Model, source: Path, hole: Path, tmp_path: Path, mode: str
):
    white = Image.fromarray(HOLE.astype(np.uint8) * 255)
    if mode in ("RGBA", "LA"):
        strokes = Image.new(mode[:-1], white.size, "white")
        strokes.putalpha(white)
    else:
        strokes = Image.fromarray(HOLE.astype(np.uint16) * 65535) if mode == "I;16" else white.convert(mode)
    strokes.save(tmp_path / "strokes.png")
    result, expected = (inpaint(model, source, mask=mask, **QUICK) for mask in (tmp_path / "strokes.png", hole))
    assert result.statistics["repainted"] == HOLE.mean() and torch.equal(result.items.stack(), expected.items.stack())


def test_a_mask_without_white_is_refused(model: Model, source: Path, tmp_path: Path):
    for dtype, found in ((np.uint8, "1 of 255"), (np.uint16, "0.00389 of 255")):
        Image.fromarray(HOLE.astype(dtype)).save(tmp_path / "m.png")
        with pytest.raises(UserError, match=rf"m\.png is nowhere white \(.* {found}\); white repaints") as error:
            inpaint(model, source, mask=tmp_path / "m.png", **QUICK)
        assert error.value.code == 1 and "\n" not in str(error.value)


def test_what_is_written(model: Model, hole: Path, tmp_path: Path):
    write_images(tmp_path / "in", torch.rand(2, 1, 8, 8) * 2 - 1, [{"label": 3}, {"label": 4}])
    inpaint(model, tmp_path / "in", mask=hole, out=tmp_path / "out", **QUICK)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["label"], row["source"]) for row in rows] == [(3, "000000.png"), (4, "000001.png")]
    assert rows[0]["method"] == "gradient" and (tmp_path / "out-sheet.png").is_file()
    unlabelled, seven = (inpaint(model, tmp_path / "in", mask=hole, label=k, **QUICK) for k in (None, "7"))
    assert not torch.allclose(unlabelled.items.stack(), seven.items.stack(), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message", "code"),
    [
        ({"mask": "nowhere.png"}, "nowhere.png: no such mask", 2),
        ({"label": "zebra"}, "zebra.*unknown to the model", 2),
        ({"method": "magic"}, "unknown method 'magic'", 2),
        ({"steps": 0}, "--steps must be at least 1", 2),
        ({"resample": 0}, "--resample must be at least 1", 2),
    ],
)
def test_wrong_settings(model: Model, source: Path, hole: Path, settings: dict, message: str, code: int):
    with pytest.raises(UserError, match=message) as error:
        inpaint(model, source, **{"mask": hole, **settings})
    assert error.value.code == code and "\n" not in str(error.value)


def test_wrong_masks_and_models(
    make_model: Callable[..., Model], sound: Modality, source: Path, hole: Path, tmp_path: Path
):
    model = make_model()
    with pytest.raises(UserError, match=r"mask m\.png is 10x12; its image is 8x8$") as error:
        inpaint(model, source, mask=save(tmp_path / "m.png", np.zeros((12, 10), bool)))
    assert error.value.code == 1
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for mask, message in (("broken.png", "cannot be read as an image"), ("empty", "no mask for 0.png")):
        with pytest.raises(UserError, match=message):
            inpaint(model, source, mask=tmp_path / mask)
    with pytest.raises(UserError, match="no images here"):
        inpaint(model, tmp_path / "empty", mask=hole)
    model.modality = sound
    with pytest.raises(UserError, match="inpaint: not supported for models of modality sound"):
        inpaint(model, source, mask=hole)


def test_the_new_label_is_recorded(model: Model, source: Path, hole: Path):
    labels = [row.get("label") for row in inpaint(model, source, mask=hole, **QUICK).metadata]
    rows = inpaint(model, source, mask=hole, label="3", **QUICK).metadata
    assert {row["label"] for row in rows} == {3} and [row.get("source_label") for row in rows] == labels


def test_items_of_several_lengths_are_refused(
    make_model: Callable[..., Model], source: Path, hole: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    monkeypatch.setattr(model.codec, "tokens", True)
    for task, settings in ((inpaint, {"mask": hole}), (outpaint, {"left": 2})):
        with pytest.raises(UserError, match="paint: not supported for items of several lengths") as error:
            task(model, source, **settings)
        assert "\n" not in str(error.value)
