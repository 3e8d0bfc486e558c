"""What several tasks need: opening a model, reading a source, sharing items between processes, output folders."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.config import DataSettings, apply_overrides, read_settings
from sfumato.data import BUILTINS
from sfumato.data.cache import allocate_tensor
from sfumato.errors import UserError
from sfumato.machine import default_device
from sfumato.model import Model, Sampling, load, read_json

Progress = Callable[[str, int, int], None]


def open_model(model: Path | str | Model, device: str | None) -> Model:
    """The model itself, or the one in a folder."""
    place = device or (str(model.device) if isinstance(model, Model) else default_device())
    _process(place)  # of several GPUs each process has its own once it has joined, so before anything is put there
    if not isinstance(model, Model):
        return load(model, device)
    return model if device is None else model.to(device)


def _process(device: str = "cpu") -> tuple[int, int]:
    """(rank, number of processes); the first call joins the group when launched by `accelerate launch` or torchrun.

    Accelerate must be told to compute on the CPU: left alone there, it takes each process for the only one.
    """
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState  # pyright: ignore[reportMissingTypeStubs]

    state: Any = PartialState(cpu=device == "cpu")
    return state.process_index, state.num_processes


def is_main() -> bool:
    """Whether this is the process that writes the files."""
    return _process()[0] == 0


def shard(n: int) -> list[int]:
    """The item numbers of this process, out of range(n)."""
    rank, count = _process()
    return list(range(n))[rank * n // count : (rank + 1) * n // count]


def gathered(items: Tensor, n: int) -> Tensor:
    """All processes' items (n, ...) in order of their numbers."""
    if _process()[1] == 1:
        return items
    from accelerate.utils import gather_object  # pyright: ignore[reportMissingTypeStubs]

    whole = torch.cat(cast("list[Tensor]", gather_object([items])))
    assert len(whole) == n
    return whole


class Collected:
    """Items (count, ...) that come in parts: kept in memory, or mapped from disk where they are too many for it.

    Args:
        count: How many there will be.
        shape: Shape of one.
    """

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        self.count, self.done = count, 0
        self.items = torch.empty(0, *shape)

    def append(self, part: Tensor) -> None:
        """Take the next items (B, ...), all of one type."""
        if not self.done:
            self.items = allocate_tensor((self.count, *part.shape[1:]), part.dtype)
        self.items[self.done : self.done + len(part)] = part
        self.done += len(part)


def batches(numbers: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    """The numbers in their order, at most `batch` at once."""
    return (numbers[first : first + batch] for first in range(0, len(numbers), batch))


def drawn(
    model: Model, numbers: Sequence[int], label: Tensor | None, how: Sampling, seed: int, batch: int
) -> Iterator[Tensor]:
    """Latents (B, *latent_shape) of new items, batch by batch: item i has the noise of its number.

    Args:
        model: What makes them.
        numbers: Their numbers (N).
        label: Class numbers (N,), None for no condition.
        how: Sampler, steps, guidance.
        seed: Seed of the noise.
        batch: Items computed at once.
    """
    done = 0
    for some in batches(numbers, batch):
        yield model.sample(some, None if label is None else label[done : done + len(some)], seed=seed, how=how)
        done += len(some)


def check_counts(least: int = 1, **counts: int | None) -> None:
    """Refuse numbers of things that are too small; None is no number."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise UserError(f"{'-' if len(name) == 1 else '--'}{name} must be at least {least}, not {count}")


def source_settings(
    model: object,
    overrides: Sequence[str],
    skip_bad: bool,
    labels: bool,
    said: Mapping[str, str | None] | None = None,
) -> DataSettings:
    """How to read a source: as the run of a model read its own, changed by what the user says.

    Args:
        model: The model or its folder, whose `run.json` tells; anything else means the usual settings.
        overrides: Settings of the data, as `data.resolution=64`.
        skip_bad: Whether files that cannot be read are left out.
        labels: Whether the run's `label_from` counts, which another source's file names need not fit.
        said: What the user says of columns, in place of what the run has; None where nothing is said.
    """
    recorded: dict[str, Any] = {}
    folder = model.folder if isinstance(model, Model) else model
    if isinstance(folder, str | Path) and (Path(folder) / "run.json").is_file():
        recorded = read_json(Path(folder) / "run.json").get("plan", {}).get("data", {})
    kept = {key: value for key, value in recorded.items() if labels or key != "label_from"}
    kept |= {key: value for key, value in (said or {}).items() if value is not None}
    foreign = next((text for text in overrides if not text.strip().startswith("data.")), None)
    if foreign is not None:
        raise UserError(f"--set {foreign}: only how the data are read can be set here, such as data.resolution=64")
    settings = apply_overrides(read_settings({"data": kept}), overrides).data
    return settings.model_copy(update={"skip_bad": True}) if skip_bad else settings


def title(target: object) -> str:
    """What to call a model or the place of samples."""
    return "the model" if isinstance(target, Model) else str(target)


def label_values(names: Sequence[str]) -> list[Any]:
    """Each class's label as the data had it: an integer if its name is one, and in sets known by name."""
    if any(list(names) == home.classes for home in BUILTINS.values()):
        return list(range(len(names)))
    return [int(name) if re.fullmatch(r"0|-?[1-9][0-9]*", name) else name for name in names]


def tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Report progress, if anyone listens."""
    if progress is not None:
        progress(stage, done, total)
