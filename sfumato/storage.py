"""JSON and safetensors files, written atomically."""

import json
import os
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.data.output import json_text
from sfumato.errors import UserError


def save_part(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` of one part of a model, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", module.state_dict())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, it is not a JSON object", code=1)
    return cast("dict[str, Any]", value)


def load_part(folder: Path, module: nn.Module) -> None:
    """Load the weights of one part of a model; their names must match exactly.

    Raises:
        UserError: The file is missing, damaged or from another model.
    """
    path = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so the model cannot be loaded", code=1) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged or from another model ({reason})", code=1) from None
