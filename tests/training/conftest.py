"""A cache of its own, a machine of fixed speed, and small sources of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.training import planning
from tests.training.common import pictures


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees another's cache; the machine's speed is not measured anew for each run."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(planning, "measure_peak", lambda *_: 1e11)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 gray images of 16 x 16 in three classes, as .npz."""
    x, label = pictures(96, (1, 16, 16))
    path = tmp_path_factory.mktemp("source") / "pictures.npz"
    np.savez(path, images=x[..., 0], labels=label)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 colour images of 8 x 8 in two class folders."""
    x, label = pictures(32, (3, 8, 8), classes=2)
    root = tmp_path_factory.mktemp("folder")
    for i, (image, kind) in enumerate(zip(x, label, strict=True)):
        place = root / ("bars", "columns")[kind]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03d}.png")
    return root
