"""The tasks on variants of models: few-step, without classes, with discrete codes, of every image mode."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import UserError
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import encode_png
from sfumato.model import Model
from tests.training.common import stirred

TEACHER = {"sampler": "heun", "steps": 4, "grid": "uniform", "guidance": 1.5, "autoguidance": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "few-step": {"distilled": TEACHER},
    "no classes": {"classes": 0},
    "few-step, no classes": {"classes": 0, "distilled": TEACHER},
    "RGBA": {"channels": 4, "mode": "RGBA"},
    "16-bit": {"mode": "I;16"},
    "VQ": {"bottleneck": "vq"},
    "VQ, RGBA, few-step": {"bottleneck": "vq", "channels": 4, "mode": "RGBA", "distilled": TEACHER},
}
HOLE = np.zeros((8, 8), bool)
HOLE[1:6, 2:7] = True


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"classes": 10, "channels": 1, "mode": "L", "bottleneck": "kl", "distilled": None} | VARIANTS[request.param]


@pytest.fixture
def variant_model(variant: dict[str, Any], make_model: Callable[..., Model]) -> Model:
    """A model of the variant with random weights."""
    config = make_model(variant["classes"], (variant["channels"], 8, 8), variant["mode"]).config
    codec = config.codec | {"bottleneck": variant["bottleneck"]}
    if variant["distilled"]:
        net = config.denoiser["net"] | {"clocks": 2}
        config = replace(config, denoiser=config.denoiser | {"net": net}, distilled=variant["distilled"])
        config.sample = {"sampler": "jump", "steps": 2, "guidance": 1.0}
    model = Model(replace(config, codec=codec))
    for seed, part in enumerate(model.parts.values()):
        stirred(part, seed)
    return model.eval()


@pytest.fixture
def source(variant: dict[str, Any], tmp_path: Path) -> Path:
    """Four images of the variant, in folders by class if the model has classes."""
    wide = variant["mode"] == "I;16"
    pixels = np.random.default_rng(0).integers(0, 65536 if wide else 256, (4, 8, 8, variant["channels"]))
    for i, image in enumerate(pixels.astype(np.uint16 if wide else np.uint8)):
        folder = tmp_path / "in" / (str(i // 2) if variant["classes"] else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(encode_png(image))
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    return tmp_path / "in"


def reconstructed(model: Model, source: Path) -> torch.Tensor:
    """The images through the codec."""
    return model.autoencode(read_images(source)[0].batch(range(4)).data).stack()


def test_edit(variant_model: Model, source: Path, variant: dict[str, Any], tmp_path: Path):
    label = "3" if variant["classes"] else None
    result = sfumato.edit(variant_model, source, label=label, strength=0.6, out=tmp_path / "out")
    assert torch.isfinite(result.items.stack()).all() and not torch.allclose(
        result.items.stack(), reconstructed(variant_model, source), atol=1e-2
    )
    torch.testing.assert_close(
        sfumato.edit(variant_model, source, label=label, batch=3).items.stack(), result.items.stack(), rtol=0, atol=1e-4
    )
    data = read_images(tmp_path / "out")[0]
    assert (data.spec, len(data)) == (variant["mode"], 4)
    back = sfumato.edit(variant_model, source, method="invert", guidance=1.0)
    assert back.statistics["inversion_error"] < 1e-3
    torch.testing.assert_close(back.items.stack(), reconstructed(variant_model, source), rtol=0, atol=5e-3)


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_inpaint(variant_model: Model, source: Path, variant: dict[str, Any], tmp_path: Path, method: str):
    settings = {"mask": tmp_path / "mask.png", "method": method, "steps": 3, "resample": 2}
    result = sfumato.inpaint(variant_model, source, out=tmp_path / "out", **settings)
    assert torch.isfinite(result.items.stack()).all()
    before, after = read_images(source)[0], read_images(tmp_path / "out")[0]
    assert after.spec == variant["mode"] and np.array_equal(after.pixels[:, ~HOLE], before.pixels[:, ~HOLE])
    assert (after.pixels[:, HOLE] != before.pixels[:, HOLE]).mean() > 0.5
    torch.testing.assert_close(
        sfumato.inpaint(variant_model, source, batch=3, **settings).items.stack(),
        result.items.stack(),
        rtol=0,
        atol=1e-4,
    )


def test_transfer(
    variant_model: Model, source: Path, variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(import_module("sfumato.tasks.transfer.residual"), "RESIDUAL_STEPS", 4)
    settings = {"samples": 8, "align": 2, "rounds": 1, "steps": 3}
    if not variant["classes"]:
        with pytest.raises(UserError, match="trained without labels"):
            sfumato.transfer(variant_model, source, label="3", **settings)
        return
    result = sfumato.transfer(variant_model, source, label="1", out=tmp_path / "out", **settings)
    assert torch.isfinite(result.items.stack()).all() and {row["label"] for row in result.metadata} == {1}
    assert read_images(tmp_path / "out")[0].spec == variant["mode"]
    torch.testing.assert_close(
        result.items.stack()[2:], reconstructed(variant_model, source)[2:], rtol=0, atol=1e-4
    )  # these have the class already
    if variant["bottleneck"] != "vq":  # a random network may move latents too little to change their codes
        assert not torch.allclose(result.items.stack()[:2], reconstructed(variant_model, source)[:2], atol=1e-3)


@pytest.mark.parametrize("path", ["flow", "latent"])
def test_interpolate(variant_model: Model, source: Path, variant: dict[str, Any], tmp_path: Path, path: str):
    files = [file for file in sorted(source.rglob("*.png"))[::3]]
    ends = reconstructed(variant_model, source)[[0, 3]]
    result = sfumato.interpolate(variant_model, *files, n=3, path=path, guidance=1.0, out=tmp_path / "out")
    torch.testing.assert_close(result.items.stack()[[0, -1]], ends, rtol=0, atol=5e-3)
    assert read_images(tmp_path / "out")[0].spec == variant["mode"]
    partly_generated = sfumato.interpolate(
        variant_model, files[0], "5", n=3, path=path, guidance=1.0, animation=tmp_path / "curve.webp"
    ).items.stack()
    torch.testing.assert_close(partly_generated[0], ends[0], rtol=0, atol=5e-3)
    generated = sfumato.interpolate(variant_model, "2", "5", n=3, path=path)
    assert torch.isfinite(generated.items.stack()).all() and generated.statistics["path"] == path


def test_outpaint_and_reconstruct(variant_model: Model, source: Path, variant: dict[str, Any], tmp_path: Path):
    sfumato.outpaint(variant_model, source, left=2, steps=2, resample=1, out=tmp_path / "out")
    before, after = read_images(source)[0], read_images(tmp_path / "out")[0]
    assert after.spec == variant["mode"] and np.array_equal(after.pixels[:, :, 2:], before.pixels)
    torch.testing.assert_close(
        variant_model.reconstruct(source).items.stack(), reconstructed(variant_model, source), rtol=0, atol=1e-5
    )
