"""What several tasks need: opening a model, sharing items between processes, checking the output folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import Model, load

Progress = Callable[[str, int, int], None]


def open_model(model: Path | str | Model, device: str | None) -> Model:
    """The model itself, or the one in a folder."""
    if not isinstance(model, Model):
        return load(model, device)
    return model if device is None else model.to(device)


def _process() -> tuple[int, int]:
    """(rank, number of processes); joins the group when launched by `accelerate launch` or torchrun."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def shard(n: int) -> list[int]:
    """The item numbers of this process, out of range(n)."""
    rank, count = _process()
    return list(range(n))[rank * n // count : (rank + 1) * n // count]


def gathered(items: Tensor, n: int) -> Tensor:
    """All processes' items (n, ...) in order of their numbers."""
    if _process()[1] == 1:
        return items
    from accelerate.utils import gather_object

    parts = gather_object([items])
    whole = torch.cat(parts)
    assert len(whole) == n
    return whole


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, an output folder with something in it."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise UserError(f"{out}: exists and is not empty; name another folder, or replace it with --overwrite")


def draw_sheet(model: Model, items: Tensor, path: Path, columns: int | None = None) -> None:
    """A picture of items (N, ...), to look at."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.modality.sheet(items, columns).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error})", code=1) from error


def tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Report progress, if anyone listens."""
    if progress is not None:
        progress(stage, done, total)
