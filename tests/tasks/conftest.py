"""Small models of 8x8 digits with random weights, and an evaluator that trains quickly."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.modalities.base import Modality
from sfumato.modalities.image import evaluator
from sfumato.modalities.image.modality import ImageModality
from sfumato.model import Model
from sfumato.storage import ModelConfig
from sfumato.types import Raw


@pytest.fixture(scope="session", autouse=True)
def quick_evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A separate cache, and few training steps for the evaluator."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        patch.delenv("SFUMATO_INCEPTION", raising=False)
        patch.setattr(evaluator, "EVALUATOR_STEPS", 60)
        yield folder


def new_model(classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8), spec: str = "L") -> Model:
    names = [str(k) for k in range(classes)]
    conditions = {"label": {"kind": "label", "names": names, "dim": 16}} if classes else {}
    return conditional_model(conditions, shape, spec)


def conditional_model(
    conditions: dict[str, dict[str, Any]], shape: tuple[int, int, int] = (1, 8, 8), spec: str = "L"
) -> Model:
    config = ModelConfig(
        modality="image",
        shape=shape,
        spec=spec,
        codec={"shape": list(shape), "downsample": 4, "channels": 3, "width": 16},
        conditioner=conditions,
        denoiser={
            "net": {"name": "mlp", "width": 32, "depth": 2},
            "schedule": {"name": "flow"},
            "predict": "flow",
        },
        sample={"sampler": "heun", "steps": 4, "guidance": 1.5 if conditions else 1.0},
    )
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in model.parts.values():
            for weight in part.parameters():  # new networks output zeros, whatever the label
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """Builds a model from (classes, shape, spec)."""
    return new_model


@pytest.fixture
def sound() -> Modality[Any]:
    """A modality with the methods of images, but without mixins: it has no masks, animations, classes or conditions."""
    constants = ("codec_class", "codec_share", "preview_items", "min_items", "example_output")
    members = {name: getattr(ImageModality, name) for name in (*Modality.__abstractmethods__, *constants)}
    return type("SoundModality", (Modality,), members | {"name": "sound"})()


@pytest.fixture(scope="session")
def model() -> Model:
    return new_model()


@pytest.fixture(scope="session")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, with the recorded settings of its data."""
    data = {"resolution": 8, "mode": "L", "label_from": "class([0-9])"}
    return saved(model, data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def portraits() -> Model:
    """A model with two labels and a number: digits from 5 on are bold, and the digit d is 20 + d years old."""
    digits = torch.arange(1000) % 10
    conditions = {
        "digit": {"kind": "label", "names": [str(k) for k in range(10)], "dim": 16},
        "style": {"kind": "label", "names": ["plain", "bold"], "dim": 16},
        "age": {"kind": "number", "mean": 24.5, "std": 2.87, "dim": 16},
    }
    model = conditional_model(conditions)
    observed = Raw({"digit": digits, "style": (digits >= 5).long(), "age": 20.0 + digits})
    assert model.conditioner.observed is not None
    model.conditioner.observed.learn(observed, len(digits))
    return model


@pytest.fixture(scope="session")
def portraits_run(portraits: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that model; its training data had the conditions in columns of the metadata."""
    data = {"resolution": 8, "mode": "L", "label_column": "digit,style,age"}
    return saved(portraits, data, tmp_path_factory.mktemp("portraits"))


def saved(model: Model, data: dict[str, Any], folder: Path) -> Path:
    """The folder of a model, with the recorded settings of its data."""
    model.save(folder)
    (folder / "run.json").write_text(json.dumps({"plan": {"data": data}}))
    return folder
