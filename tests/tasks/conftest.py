"""A small model of 8x8 digits with random weights, and a network that judges quickly."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sfumato.modality import judge
from sfumato.model import Card, Model


@pytest.fixture(scope="session", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of these tests' own, and few steps for the networks that judge."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        patch.delenv("SFUMATO_INCEPTION", raising=False)
        patch.setattr(judge, "STEPS", 60)
        yield folder


def new_model(classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8), mode: str = "L") -> Model:
    card = Card(
        modality="image",
        shape=shape,
        mode=mode,
        label_names=[str(k) for k in range(classes)],
        codec={"shape": list(shape), "downsample": 4, "channels": 3, "width": 16},
        conditioner={"name": "label", "classes": classes, "dim": 16} if classes else {"name": "none"},
        denoiser={
            "net": {"name": "mlp", "width": 32, "depth": 2},
            "schedule": {"name": "flow"},
            "predict": "flow",
        },
        sample={"sampler": "heun", "steps": 4, "guidance": 1.5 if classes else 1.0},
    )
    model = Model(card)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in model.parts.values():
            for weight in part.parameters():  # new networks give zeros, and would not tell labels apart
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """Makes a model from (classes, shape, mode)."""
    return new_model


@pytest.fixture(scope="session")
def model() -> Model:
    return new_model()


@pytest.fixture(scope="session")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, with what its run recorded of how it read its data."""
    folder = tmp_path_factory.mktemp("run")
    model.save(folder)
    data = {"resolution": 8, "mode": "L", "label_from": "class([0-9])"}
    (folder / "run.json").write_text(json.dumps({"plan": {"data": data}}))
    return folder
