"""Checkpoints: safetensors and JSON, replaced atomically."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sfumato.errors import UserError
from sfumato.storage import read_json, write_json, write_tensors

State = tuple[dict[str, Tensor], dict[str, Any]]


def save_state(folder: Path, state: State) -> None:
    """Replace the checkpoint: write a new one beside it, then rename.

    If the process is killed at any moment, one complete checkpoint remains.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    tensors, metadata = state
    try:
        new.mkdir(parents=True)
        write_tensors(new / "state.safetensors", tensors)
        write_json(new / "state.json", metadata)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # a partial checkpoint would keep a full disk full
        raise
    if folder.exists():  # otherwise the last replacement was interrupted, and only `old` is complete
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> State | None:
    """Load the checkpoint, or the previous one if its replacement was interrupted; None without either.

    Raises:
        UserError: The checkpoint is damaged.
    """
    for path in (folder, folder.with_name(folder.name + ".old")):
        if (path / "state.json").is_file():
            try:
                return load_file(path / "state.safetensors"), read_json(path / "state.json")
            except Exception as error:
                raise UserError(
                    f"{path}: the checkpoint is damaged ({error}); start again with --overwrite", code=1
                ) from None
    return None
