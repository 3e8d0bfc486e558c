"""The tasks of given items on models of every kind: few-step, without classes, of discrete codes, of any mode."""

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
from sfumato.data import read_images
from sfumato.data.write import png
from sfumato.errors import UserError
from sfumato.model import Model
from tests.training.common import stirred

TAUGHT = {"sampler": "heun", "steps": 4, "grid": "uniform", "guidance": 1.5, "autoguidance": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "few-step": {"distilled": TAUGHT},
    "no classes": {"classes": 0},
    "few-step, no classes": {"classes": 0, "distilled": TAUGHT},
    "RGBA": {"channels": 4, "mode": "RGBA"},
    "16-bit": {"mode": "I;16"},
    "VQ": {"bottleneck": "vq"},
    "VQ, RGBA, few-step": {"bottleneck": "vq", "channels": 4, "mode": "RGBA", "distilled": TAUGHT},
}
HOLE = np.zeros((8, 8), bool)
HOLE[1:6, 2:7] = True


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"classes": 10, "channels": 1, "mode": "L", "bottleneck": "kl", "distilled": None} | KINDS[request.param]


@pytest.fixture
def made(kind: dict[str, Any], make_model: Callable[..., Model]) -> Model:
    """A random model of the kind."""
    card = make_model(kind["classes"], (kind["channels"], 8, 8), kind["mode"]).card
    codec = card.codec | {"bottleneck": kind["bottleneck"]}
    if kind["distilled"]:
        net = card.denoiser["net"] | {"clocks": 2}
        card = replace(card, denoiser=card.denoiser | {"net": net}, distilled=kind["distilled"])
        card.sample = {"sampler": "jump", "steps": 2, "guidance": 1.0}
    model = Model(replace(card, codec=codec))
    for seed, part in enumerate(model.parts.values()):
        stirred(part, seed)
    return model.eval()


@pytest.fixture
def source(kind: dict[str, Any], tmp_path: Path) -> Path:
    """Four images of the kind, in folders that are classes if the model has any."""
    wide = kind["mode"] == "I;16"
    pixels = np.random.default_rng(0).integers(0, 65536 if wide else 256, (4, 8, 8, kind["channels"]))
    for i, image in enumerate(pixels.astype(np.uint16 if wide else np.uint8)):
        folder = tmp_path / "in" / (str(i // 2) if kind["classes"] else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(image))
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    return tmp_path / "in"


def codec(model: Model, source: Path) -> torch.Tensor:
    """What the codec makes of the images."""
    return model.autoencode(read_images(source)[0].batch(range(4)).data)


def test_edit(made: Model, source: Path, kind: dict[str, Any], tmp_path: Path):
    label = "3" if kind["classes"] else None
    result = sfumato.edit(made, source, label=label, strength=0.6, out=tmp_path / "out")
    assert torch.isfinite(result.items).all() and not torch.allclose(result.items, codec(made, source), atol=1e-2)
    torch.testing.assert_close(sfumato.edit(made, source, label=label, batch=3).items, result.items, rtol=0, atol=1e-4)
    data = read_images(tmp_path / "out")[0]
    assert (data.mode, len(data)) == (kind["mode"], 4)
    back = sfumato.edit(made, source, method="invert", guidance=1.0)
    assert back.facts["inversion_error"] < 1e-3
    torch.testing.assert_close(back.items, codec(made, source), rtol=0, atol=5e-3)


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_inpaint(made: Model, source: Path, kind: dict[str, Any], tmp_path: Path, method: str):
    how = {"mask": tmp_path / "mask.png", "method": method, "steps": 3, "resample": 2}
    result = sfumato.inpaint(made, source, out=tmp_path / "out", **how)
    assert torch.isfinite(result.items).all()
    before, after = read_images(source)[0], read_images(tmp_path / "out")[0]
    assert after.mode == kind["mode"] and np.array_equal(after.pixels[:, ~HOLE], before.pixels[:, ~HOLE])
    assert (after.pixels[:, HOLE] != before.pixels[:, HOLE]).mean() > 0.5
    torch.testing.assert_close(sfumato.inpaint(made, source, batch=3, **how).items, result.items, rtol=0, atol=1e-4)


def test_transfer(made: Model, source: Path, kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("sfumato.core.bend"), "STEPS", 4)
    how = {"samples": 8, "align": 2, "rounds": 1, "steps": 3}
    if not kind["classes"]:
        with pytest.raises(UserError, match="trained without labels"):
            sfumato.transfer(made, source, label="3", **how)
        return
    result = sfumato.transfer(made, source, label="1", out=tmp_path / "out", **how)
    assert torch.isfinite(result.items).all() and {row["label"] for row in result.rows} == {1}
    assert read_images(tmp_path / "out")[0].mode == kind["mode"]
    torch.testing.assert_close(result.items[2:], codec(made, source)[2:], rtol=0, atol=1e-4)  # these were of it already
    if kind["bottleneck"] != "vq":  # a random network moves latents so little that they may keep their codes
        assert not torch.allclose(result.items[:2], codec(made, source)[:2], atol=1e-3)


@pytest.mark.parametrize("path", ["flow", "latent"])
def test_interpolate(made: Model, source: Path, kind: dict[str, Any], tmp_path: Path, path: str):
    files = [file for file in sorted(source.rglob("*.png"))[::3]]
    ends = codec(made, source)[[0, 3]]
    result = sfumato.interpolate(made, *files, n=3, path=path, guidance=1.0, out=tmp_path / "out")
    torch.testing.assert_close(result.items[[0, -1]], ends, rtol=0, atol=5e-3)
    assert read_images(tmp_path / "out")[0].mode == kind["mode"]
    mixed = sfumato.interpolate(
        made, files[0], "5", n=3, path=path, guidance=1.0, animation=tmp_path / "way.webp"
    ).items
    torch.testing.assert_close(mixed[0], ends[0], rtol=0, atol=5e-3)
    new = sfumato.interpolate(made, "2", "5", n=3, path=path)
    assert torch.isfinite(new.items).all() and new.facts["path"] == path


def test_outpaint_and_reconstruct(made: Model, source: Path, kind: dict[str, Any], tmp_path: Path):
    sfumato.outpaint(made, source, left=2, steps=2, resample=1, out=tmp_path / "out")
    before, after = read_images(source)[0], read_images(tmp_path / "out")[0]
    assert after.mode == kind["mode"] and np.array_equal(after.pixels[:, :, 2:], before.pixels)
    torch.testing.assert_close(made.reconstruct(source).items, codec(made, source), rtol=0, atol=1e-5)
