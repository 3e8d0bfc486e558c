"""A cache per test, a machine of fixed speed, and small image sources."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.training import distillation, profile
from tests.training.common import pictures
from tests.training.teachers import new_model


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate the cache, and skip measuring the machine in each run."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(profile, "measure_peak", lambda *_: 1e11)


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
    for i, (image, number) in enumerate(zip(x, label, strict=True)):
        class_folder = root / ("bars", "columns")[number]
        class_folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(class_folder / f"{i:03d}.png")
    return root


@pytest.fixture(autouse=True)
def small_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "MAX_BATCH", 32)
    monkeypatch.setattr(distillation, "CHECK_TRAJECTORIES", 20)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the record of its training."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    new_model().save(folder)
    data = {"resolution": 8, "mode": "L", "held_out": 0.1}
    plan = {"data": data, "train": {"precision": "fp32"}}
    run_json = {"source": "digits", "sfumato": "0", "plan": plan, "done": ["codec", "denoiser"], "seconds_taken": 100.0}
    (folder / "run.json").write_text(json.dumps(run_json | {"metrics": {"codec": {"psnr": 20.0}}}))
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its student after four steps."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "MAX_BATCH", 32)
        patch.setattr(distillation, "CHECK_TRAJECTORIES", 20)
        sfumato.distill(teacher, out=folder, steps=4, device="cpu")
    return folder
