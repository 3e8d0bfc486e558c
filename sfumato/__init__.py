"""Latent diffusion models for anything you have: `sfumato.fit(...)`, `sfumato.load(...)`, `model.generate(...)`.

The public names are imported when first used, so that `import sfumato` takes no time and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.config import Settings
    from sfumato.errors import UserError
    from sfumato.modality import register
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
    from sfumato.tasks.transfer import transfer
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

_HOMES = {
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
    "register": "modality",
    "transfer": "tasks.transfer",
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"sfumato.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported yet or not."""
    return sorted(__all__)
