"""Distributed processes: rank, shards of the items, and gathering results."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.types import Items

ItemsT = TypeVar("ItemsT", Tensor, Items)


def rank_and_size(device: str = "cpu") -> tuple[int, int]:
    """(rank, number of processes); under `accelerate launch` or torchrun the first call joins the process group.

    `cpu=True` is needed on the CPU: without it, Accelerate takes each process for the only one.
    """
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState  # pyright: ignore[reportMissingTypeStubs]

    state: Any = PartialState(cpu=device == "cpu")
    return state.process_index, state.num_processes


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return rank_and_size()[0] == 0


def shard(n: int) -> list[int]:
    """This process's share of the item numbers range(n)."""
    rank, count = rank_and_size()
    return list(range(n))[rank * n // count : (rank + 1) * n // count]


def gather(items: ItemsT, n: int) -> ItemsT:
    """Concatenate the items of all processes, (n, ...), in the order of their numbers."""
    if rank_and_size()[1] == 1:
        return items
    from accelerate.utils import gather_object  # pyright: ignore[reportMissingTypeStubs]

    parts: Any = gather_object([items])
    gathered: Any = torch.cat(parts) if isinstance(items, Tensor) else Items.concat(parts)
    assert len(gathered) == n
    return gathered
