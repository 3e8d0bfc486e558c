"""A teacher with random weights, for the distillation tests."""

from typing import Any

from sfumato.model import Model
from sfumato.storage import ModelConfig
from tests.training.common import stirred

TEACHER_SAMPLING = {"sampler": "heun", "steps": 4, "grid": "uniform", "guidance": 1.0, "autoguidance": 1.0}


def new_model(classes: int = 3, predict: str = "flow", **net: Any) -> Model:
    """A model with random weights whose samples depend on noise, time and label."""
    config = ModelConfig(
        modality="image",
        shape=(1, 8, 8),
        spec="L",
        codec={"shape": [1, 8, 8], "downsample": 4, "channels": 2, "width": 16},
        conditioner={"label": {"kind": "label", "names": list(map(str, range(classes))), "dim": 8}} if classes else {},
        denoiser={
            "net": {"name": "mlp", "width": 32, "depth": 1, **net},
            "schedule": {"name": "flow"},
            "predict": predict,
        },
        sample={"sampler": "heun", "steps": 4, "guidance": 1.5 if classes else 1.0},
    )
    model = Model(config)
    for part in model.parts.values():
        stirred(part)
    return model.eval()
