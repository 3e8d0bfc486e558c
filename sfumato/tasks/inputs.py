"""What tasks share: reading a source and its conditions, going through it in batches, opening a model."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.conditioners import constant_conditions, parse_conditions
from sfumato.config import DataSettings, apply_overrides, read_settings
from sfumato.data.cache import allocate_tensor
from sfumato.data.conditions import Index, Labels
from sfumato.data.dataset import Dataset
from sfumato.distributed import gather, rank_and_size, shard
from sfumato.errors import UserError
from sfumato.hardware import default_device
from sfumato.modalities.base import Modality
from sfumato.model import Model, load
from sfumato.sampling import Sampling
from sfumato.storage import read_json
from sfumato.tasks.conditions import (
    class_numbers,
    condition_metadata,
    known_values,
    matching_name,
    metadata_values,
    table_rows,
)
from sfumato.types import Items, Latent, Progress, Raw

MixinT = TypeVar("MixinT")


@dataclass
class SourceItems:
    """All items of a source.

    Attributes:
        source: The source as the user named it.
        parts: Data sets that follow one another.
        settings: How they were read.
    """

    source: str
    parts: list[Dataset]
    settings: DataSettings

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, index: Sequence[int]) -> Items:
        """The items (B, ...) of increasing indices."""
        taken: list[Items] = []
        first = 0
        for data in self.parts:
            here = [i - first for i in index if first <= i < first + len(data)]
            if here:
                taken.append(batch_items(data, here))
            first += len(data)
        return Items.concat(taken)

    def metadata(self, modality: Modality[Any]) -> list[dict[str, Any]]:
        """A row per item."""
        return [row for data in self.parts for row in item_metadata(modality, data, range(len(data)))]

    def notes(self) -> dict[str, Any]:
        """Notes of the reader under the key `notes`; empty without any."""
        notes = [note for data in self.parts for note in data.notes]
        return {"notes": list(dict.fromkeys(notes))} if notes else {}

    def raw(self, model: Model, without: Collection[str] = ()) -> Raw:
        """The model's conditions of the items (N), but for those that the source does not tell of any item.

        Args:
            model: The model, by whose classes labels are numbered.
            without: Names of conditions to leave out.

        Raises:
            UserError: The model does not know a class.
        """
        conditioner = model.conditioner
        names = [name for name in conditioner.names if name not in without]
        raw = Raw.concat([Raw({name: known_values(conditioner, data, name) for name in names}) for data in self.parts])
        return raw.only(name for name, values in raw.values.items() if bool(conditioner[name].known(values).any()))


def batch_items(data: Dataset, index: Index) -> Items:
    """The items `index` (B,) of a data set."""
    batch = data.batch(index)
    return Items.unpad(batch.data, batch.mask)


def model_labels(model: Model, data: Dataset) -> NDArray[np.int64]:
    """The model's class number of each item's primary label (N,), `UNKNOWN` without a label.

    Raises:
        UserError: The model does not know a class.
    """
    conditioner, name = model.conditioner, model.conditioner.primary_label
    known = None if name is None else data.conditions.get(matching_name(conditioner, data, name))
    return class_numbers(conditioner, name or "", known, len(data))


def item_metadata(modality: Modality[Any], data: Dataset, index: Sequence[int]) -> list[dict[str, Any]]:
    """A row per item: its file (`source`) and conditions such as `label` and `text`, where there are any."""
    columns: dict[str, list[Any]] = {} if data.names is None else {"source": [data.names[i] for i in index]}
    for name, known in data.conditions.items():
        label_values = modality.label_values(known.names) if isinstance(known, Labels) else ()
        columns[name] = metadata_values(known.raw(index), label_values)
    return table_rows(columns, len(index))


def require(model: Model, mixin: type[MixinT], task: str) -> MixinT:
    """The model's modality, which must be a `mixin` for this task."""
    modality: Any = model.modality
    if not isinstance(modality, get_origin(mixin) or mixin):  # the mixin may be a `Maskable[Any]`
        raise UserError(f"{task}: not supported for models of modality {model.modality.name}")
    return modality


def read_items(
    model: Path | str | Model, loaded: Model, source: str | Path, overrides: Sequence[str], skip_bad: bool
) -> SourceItems:
    """Read all items of a source and check that they fit the model.

    Args:
        model: The model as the user named it; its run records how sources are read.
        loaded: The model.
        source: Path or name of the source.
        overrides: Data settings such as `data.resolution=64`.
        skip_bad: Whether to skip unreadable files.
    """
    settings = source_settings(model, overrides, skip_bad, labels=False)
    modality, config = loaded.modality, loaded.config
    parts = read_parts(modality, str(source), settings, overrides, config.spec)
    modality.check_compatible(display_name(model), config.shape, config.spec, source, parts[0])
    return SourceItems(str(source), parts, settings)


def read_parts(
    modality: Modality[Any], source: str, settings: DataSettings, overrides: Sequence[str], spec: Any
) -> list[Any]:
    """The parts of a source: all its items, or training and held-out ones.

    A source need not have the columns of conditions that the model was trained with, unless `overrides` name them.
    """
    try:
        data, held_out = modality.read(source, settings, spec)
    except UserError:
        if not settings.label_column or any("label_column" in text for text in overrides):
            raise
        data, held_out = modality.read(source, settings.model_copy(update={"label_column": ()}), spec)
    return [data] if held_out is None else [data, held_out]


def check_complete(model: Model, originals: SourceItems) -> None:
    """Refuse items that cannot be inverted because they lack values."""
    model.modality.check_complete(originals.source, originals.parts, model.config.spec)


def item_conditions(model: Model, label: str | Sequence[str] | None, originals: SourceItems) -> Raw:
    """The conditions of a source's items (N): the given ones, the same for all, and for the others the source's own.

    Args:
        model: The model.
        label: Classes of the primary label, or `name=value` of any condition.
        originals: The items.

    Raises:
        UserError: The model does not know a condition or a class.
    """
    given = parse_conditions(model.conditioner, label)
    constant = constant_conditions(model.conditioner, given, len(originals))
    return Raw({**originals.raw(model, without=given).values, **constant.values})


@torch.no_grad()
def map_items(
    model: Model,
    originals: SourceItems,
    transform: Callable[[list[int], Items], Items],
    batch: int,
    stage: str,
    progress: Progress | None,
) -> Items:
    """All items (N, ...) transformed batch by batch, split between processes.

    `transform` maps item numbers and items (B, ...) to items (B, ...).
    """
    numbers = shard(len(originals))
    results = ItemBuffer(len(numbers), model.config.shape)
    for first in range(0, len(numbers), batch):
        items = numbers[first : first + batch]
        results.append(transform(items, originals.take(items)))
        report_progress(progress, stage, first + len(items), len(numbers))
    return gather(results.items, len(originals))


def output_metadata(
    model: Model, originals: SourceItems, raw: Raw | None, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row per item with the task's settings; new conditions replace the old ones, which become `source_NAME`.

    Args:
        model: The model.
        originals: The items (N).
        raw: Their new conditions (N); those that are unknown keep their value.
        settings: The same for all items.
    """
    conditioner = model.conditioner
    names = {name: matching_name(conditioner, originals.parts[0], name) for name in conditioner.names}
    rows = originals.metadata(model.modality)
    for row, new in zip(rows, condition_metadata(model, raw or Raw(), len(rows)), strict=True):
        for name, value in new.items():
            old = row.get(name) if names[name] == name else row.pop(names[name], None)
            if old is not None and (name == conditioner.primary_label or old != value):  # a label is always recorded
                row[f"source_{name}"] = old
            row[name] = value
    return [row | settings for row in rows]


def open_model(model: Path | str | Model, device: str | None) -> Model:
    """The model itself, or the one in a folder."""
    target = device or (str(model.device) if isinstance(model, Model) else default_device())
    rank_and_size(target)  # joining the group selects this process's GPU, so it comes before anything is put there
    if not isinstance(model, Model):
        return load(model, device)
    return model if device is None else model.to(device)


class ItemBuffer:
    """Items (count, ...) that arrive in batches.

    Items of one shape are held in memory, or on disk if memory is too small.

    Args:
        count: Number of items.
        shape: Shape of an item.
    """

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        self.count, self.done = count, 0
        self.stacked = torch.empty(0, *shape)
        self.separate: list[Tensor] | None = None  # all items, once some come in several lengths

    @property
    def items(self) -> Items:
        """The items."""
        return Items(self.stacked if self.separate is None else self.separate)

    def append(self, batch: Items) -> None:
        """Add the next items (B, ...), all of one dtype."""
        if self.separate is None and not isinstance(batch.data, Tensor):
            self.separate = list(self.stacked[: self.done])
        if self.separate is not None:
            self.separate.extend(batch)
        else:
            self._stack(batch.stack())
        self.done += len(batch)

    def _stack(self, batch: Tensor) -> None:
        if not self.done:
            self.stacked = allocate_tensor((self.count, *batch.shape[1:]), batch.dtype)
        self.stacked[self.done : self.done + len(batch)] = batch


def batches(numbers: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    """Consecutive slices of at most `batch` numbers."""
    return (numbers[first : first + batch] for first in range(0, len(numbers), batch))


def sample_latents(
    model: Model, numbers: Sequence[int], raw: Raw | None, sampling: Sampling, seed: int, batch: int
) -> Iterator[Latent]:
    """Latents (B, *latent_shape) of new items, batch by batch; item i has the noise of its number.

    Args:
        model: The model.
        numbers: Item numbers (N).
        raw: Their conditions (N); None for the null condition.
        sampling: Sampler, steps, guidance.
        seed: Seed of the noise.
        batch: Items per batch.
    """
    done = 0
    for part in batches(numbers, batch):
        conditions = None if raw is None else raw.select(torch.arange(done, done + len(part)))
        yield model.sample(part, conditions, seed=seed, sampling=sampling)
        done += len(part)


def check_counts(minimum: int = 1, **counts: int | None) -> None:
    """Refuse counts below the minimum; None is no count."""
    for name, count in counts.items():
        if count is not None and count < minimum:
            raise UserError(f"{'-' if len(name) == 1 else '--'}{name} must be at least {minimum}, not {count}")


def source_settings(
    model: object,
    overrides: Sequence[str],
    skip_bad: bool,
    labels: bool,
    columns: Mapping[str, str | None] | None = None,
) -> DataSettings:
    """How to read a source: as the model's run read its own, with what the user overrides.

    Args:
        model: The model or its folder, whose `run.json` has the settings; anything else means the defaults.
        overrides: Data settings such as `data.resolution=64`.
        skip_bad: Whether to skip unreadable files.
        labels: Whether to use the run's `label_from`, which other file names need not match.
        columns: Settings of table columns; None keeps the run's.
    """
    recorded: dict[str, Any] = {}
    folder = model.folder if isinstance(model, Model) else model
    if isinstance(folder, str | Path) and (Path(folder) / "run.json").is_file():
        recorded = read_json(Path(folder) / "run.json").get("plan", {}).get("data", {})
    kept = {key: value for key, value in recorded.items() if labels or key != "label_from"}
    kept |= {key: value for key, value in (columns or {}).items() if value is not None}
    wrong = next((text for text in overrides if not text.strip().startswith("data.")), None)
    if wrong is not None:
        raise UserError(f"--set {wrong}: only data settings can be set here, such as data.resolution=64")
    settings = apply_overrides(read_settings({"data": kept}), overrides).data
    return settings.model_copy(update={"skip_bad": True}) if skip_bad else settings


def display_name(model: object) -> str:
    """The name of a model, or of a path of samples, in messages."""
    return "the model" if isinstance(model, Model) else str(model)


def report_progress(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Call the progress callback, if there is one."""
    if progress is not None:
        progress(stage, done, total)
