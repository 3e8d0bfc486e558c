"""Checkpoints: safetensors and JSON, whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import read_json, write_json, write_tensors

State = tuple[dict[str, Tensor], dict[str, Any]]


def save_state(folder: Path, state: State) -> None:
    """Replace the checkpoint: written beside it, then renamed; killed at any moment, one whole checkpoint is left."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    tensors, facts = state
    try:
        new.mkdir(parents=True)
        write_tensors(new / "state.safetensors", tensors)
        write_json(new / "state.json", facts)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk half a checkpoint would only be in the way
        raise
    if folder.exists():  # else the exchange before was cut short, and `old` is all there is
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> State | None:
    """The checkpoint, or the one before if the exchange was cut short; None without either."""
    for place in (folder, folder.with_name(folder.name + ".old")):
        if (place / "state.json").is_file():
            try:
                return load_file(place / "state.safetensors"), read_json(place / "state.json")
            except Exception as error:
                raise UserError(
                    f"{place}: the checkpoint is damaged ({error}); start again with --overwrite", code=1
                ) from None
    return None
