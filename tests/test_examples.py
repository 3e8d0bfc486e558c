"""The examples run, with few steps and small sizes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("train.precision=fp32", "train.denoiser.batch=32", "denoiser.width=32", "denoiser.depth=1", "sample.steps=4")
SMALL = (*TINY, "train.codec.batch=16", "codec.width=16", "codec.perceptual=none", "sample.guidance=1.5")


def example(name: str) -> ModuleType:
    """Load an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def varies(path: Path) -> bool:
    """Whether a picture is not uniform."""
    return float(np.asarray(Image.open(path).convert("L"), np.float32).std()) > 1


def test_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    module, run = example("mnist"), tmp_path / "run"
    pictures = module.main("digits", out=str(run), steps=20, overrides=SMALL)
    names = {"loss.png", "forward.png", "reverse.png", "reconstructions.png", "samples.png"}
    assert {path.name for path in pictures.iterdir()} == names
    assert all(varies(path) for path in pictures.iterdir())
    wide = {name: Image.open(pictures / name) for name in ("forward.png", "reverse.png")}
    assert wide["forward.png"].width > wide["forward.png"].height  # nine times of eight items
    assert wide["reverse.png"].width < wide["reverse.png"].height  # four steps of eight items

    before = (run / "denoiser" / "model.safetensors").stat().st_mtime_ns
    module.main("digits", out=str(run), steps=20, overrides=SMALL)  # again: reuses the model
    assert (run / "denoiser" / "model.safetensors").stat().st_mtime_ns == before


def test_table(tmp_path: Path):
    report = example("table").main(tmp_path, steps=20, overrides=TINY, device="cpu")
    assert {"wine.csv", "made.csv", "made.png", "strong.csv", "run"} <= {path.name for path in tmp_path.iterdir()}
    header, *rows = (tmp_path / "made.csv").read_text().splitlines()
    assert header == (tmp_path / "wine.csv").read_text().splitlines()[0] and len(rows) == 178
    assert all(float(row.split(",")[0]) >= 13 for row in (tmp_path / "strong.csv").read_text().splitlines()[1:])
    assert varies(tmp_path / "made.png") and 0 <= report["copy_auc"] <= 1


def test_examples_are_short():
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert sizes and max(sizes.values()) < 60
