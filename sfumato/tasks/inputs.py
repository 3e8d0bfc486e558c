"""What tasks share: reading a source and its labels, going through it in batches, opening a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.config import DataSettings, apply_overrides, read_settings
from sfumato.data.cache import allocate_tensor
from sfumato.data.dataset import Dataset
from sfumato.data.metadata import renumber_labels
from sfumato.distributed import gather, rank_and_size, shard
from sfumato.errors import UserError
from sfumato.hardware import default_device
from sfumato.modalities.base import Modality
from sfumato.model import Model, load
from sfumato.sampling import Sampling
from sfumato.storage import read_json
from sfumato.types import UNKNOWN, Progress

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

    def take(self, index: Sequence[int]) -> Tensor:
        """The items (B, ...) of increasing indices."""
        taken: list[Tensor] = []
        first = 0
        for data in self.parts:
            taken.append(data.batch([i - first for i in index if first <= i < first + len(data)]).data)
            first += len(data)
        return torch.cat(taken)

    def metadata(self, modality: Modality[Any]) -> list[dict[str, Any]]:
        """A row per item."""
        return [row for data in self.parts for row in item_metadata(modality, data, range(len(data)))]

    def notes(self) -> dict[str, Any]:
        """Notes of the reader under the key `notes`; empty without any."""
        notes = [note for data in self.parts for note in data.notes]
        return {"notes": list(dict.fromkeys(notes))} if notes else {}

    def labels(self, model: Model) -> Tensor | None:
        """The model's class number of each item (N,); None if the source or the model has no classes."""
        if not model.conditioner.classes or self.parts[0].labels is None:
            return None
        return torch.tensor(np.concatenate([model_labels(model, data) for data in self.parts]))


def model_labels(model: Model, data: Dataset) -> NDArray[np.int64]:
    """The model's class number of each item (N,), `UNKNOWN` without a label.

    Raises:
        UserError: The model does not know a class.
    """
    if data.labels is None:
        return np.full(len(data), UNKNOWN)
    present = set(data.labels.tolist())
    numbers = [model.class_number(name) if k in present else UNKNOWN for k, name in enumerate(data.label_names)]
    return renumber_labels(data.labels, numbers)


def item_metadata(modality: Modality[Any], data: Dataset, index: Sequence[int]) -> list[dict[str, Any]]:
    """A row per item: its file (`source`), `label` and `text`, where there are any."""
    values, metadata = modality.label_values(data.label_names), list[dict[str, Any]]()
    for i in index:
        row: dict[str, Any] = {}
        if data.names is not None:
            row["source"] = data.names[i]
        if data.labels is not None and data.labels[i] != UNKNOWN:
            row["label"] = values[int(data.labels[i])]
        if data.captions is not None:
            row["text"] = data.captions[i]
        metadata.append(row)
    return metadata


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
    data, held_out = modality.read(str(source), settings, config.spec)
    modality.check_compatible(display_name(model), config.shape, config.spec, source, data)
    return SourceItems(str(source), [data] if held_out is None else [data, held_out], settings)


def check_complete(model: Model, originals: SourceItems) -> None:
    """Refuse items that cannot be inverted because they lack values."""
    model.modality.check_complete(originals.source, originals.parts, model.config.spec)


def class_numbers(model: Model, label: str | None, originals: SourceItems) -> Tensor | None:
    """Class number of each item (N,): of the class `label`, or of the source's labels if it is None."""
    return originals.labels(model) if label is None else torch.full((len(originals),), model.class_number(label))


def select(labels: Tensor | None, index: Sequence[int]) -> Tensor | None:
    """The labels (B,) at these indices; None without labels."""
    return None if labels is None else labels[list(index)]


@torch.no_grad()
def map_items(
    model: Model,
    originals: SourceItems,
    transform: Callable[[list[int], Tensor], Tensor],
    batch: int,
    stage: str,
    progress: Progress | None,
) -> Tensor:
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
    model: Model, originals: SourceItems, labels: Tensor | None, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row per item with the task's settings; a new label replaces the old one, which becomes `source_label`.

    `labels` (N,) are class numbers; items with `UNKNOWN` keep their row.
    """
    metadata = originals.metadata(model.modality)
    values = model.modality.label_values(model.config.label_names)
    for i, row in enumerate(metadata):
        if labels is not None and int(labels[i]) != UNKNOWN:
            row |= {"source_label": row["label"]} if "label" in row else {}
            row["label"] = values[int(labels[i])]
    return [row | settings for row in metadata]


def open_model(model: Path | str | Model, device: str | None) -> Model:
    """The model itself, or the one in a folder."""
    target = device or (str(model.device) if isinstance(model, Model) else default_device())
    rank_and_size(target)  # joining the group selects this process's GPU, so it comes before anything is put there
    if not isinstance(model, Model):
        return load(model, device)
    return model if device is None else model.to(device)


class ItemBuffer:
    """Items (count, ...) that arrive in batches, held in memory, or on disk if memory is too small.

    Args:
        count: Number of items.
        shape: Shape of an item.
    """

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        self.count, self.done = count, 0
        self.items = torch.empty(0, *shape)

    def append(self, batch: Tensor) -> None:
        """Add the next items (B, ...), all of one dtype."""
        if not self.done:
            self.items = allocate_tensor((self.count, *batch.shape[1:]), batch.dtype)
        self.items[self.done : self.done + len(batch)] = batch
        self.done += len(batch)


def batches(numbers: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    """Consecutive slices of at most `batch` numbers."""
    return (numbers[first : first + batch] for first in range(0, len(numbers), batch))


def sample_latents(
    model: Model, numbers: Sequence[int], labels: Tensor | None, sampling: Sampling, seed: int, batch: int
) -> Iterator[Tensor]:
    """Latents (B, *latent_shape) of new items, batch by batch; item i has the noise of its number.

    Args:
        model: The model.
        numbers: Item numbers (N).
        labels: Class numbers (N,), None for no condition.
        sampling: Sampler, steps, guidance.
        seed: Seed of the noise.
        batch: Items per batch.
    """
    done = 0
    for part in batches(numbers, batch):
        labels_part = None if labels is None else labels[done : done + len(part)]
        yield model.sample(part, labels_part, seed=seed, sampling=sampling)
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
