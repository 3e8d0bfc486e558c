"""Latent diffusion models for anything you have: `sfumato.fit(...)`, `sfumato.load(...)`, `model.generate(...)`.

The public names are imported on first use, so that `import sfumato` is fast and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.config import Settings
    from sfumato.errors import UserError
    from sfumato.modalities import register
    from sfumato.model import Model, load
    from sfumato.tasks.augment import augment
    from sfumato.tasks.edit import edit
    from sfumato.tasks.evaluate import evaluate
    from sfumato.tasks.generate import generate
    from sfumato.tasks.info import info
    from sfumato.tasks.inpaint import inpaint
    from sfumato.tasks.interpolate import interpolate
    from sfumato.tasks.outpaint import outpaint
    from sfumato.tasks.reconstruct import reconstruct
    from sfumato.tasks.transfer.task import transfer
    from sfumato.training import distill, fit

__version__ = "0.1.0"

__all__ = [
    "Model",
    "Settings",
    "UserError",
    "__version__",
    "augment",
    "distill",
    "edit",
    "evaluate",
    "fit",
    "generate",
    "info",
    "inpaint",
    "interpolate",
    "load",
    "outpaint",
    "reconstruct",
    "register",
    "transfer",
]

_MODULES = {
    "Model": "model",
    "Settings": "config",
    "UserError": "errors",
    "augment": "tasks.augment",
    "distill": "training",
    "edit": "tasks.edit",
    "evaluate": "tasks.evaluate",
    "fit": "training",
    "generate": "tasks.generate",
    "info": "tasks.info",
    "inpaint": "tasks.inpaint",
    "interpolate": "tasks.interpolate",
    "load": "model",
    "outpaint": "tasks.outpaint",
    "reconstruct": "tasks.reconstruct",
    "register": "modalities",
    "transfer": "tasks.transfer.task",
}


def __getattr__(name: str) -> Any:
    """Import the public name `name`."""
    if name not in _MODULES:
        raise AttributeError(f"module 'sfumato' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"sfumato.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """All public names, whether imported yet or not."""
    return sorted(__all__)
