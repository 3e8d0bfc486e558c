"""The parts of `augment`: labelled items, pseudo-labelled items, and generated items until every class is full."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.core import step_generator
from sfumato.data.conditions import LABEL
from sfumato.data.dataset import Dataset
from sfumato.distributed import gather, shard
from sfumato.errors import UserError
from sfumato.modalities.base import Labelable, Labeler
from sfumato.model import Model
from sfumato.sampling import Sampling, complete_conditions
from sfumato.tasks.conditions import condition_metadata, matching_name
from sfumato.tasks.inputs import (
    batch_items,
    display_name,
    item_metadata,
    model_labels,
    read_parts,
    report_progress,
    require,
    sample_latents,
    source_settings,
)
from sfumato.types import UNKNOWN, Items, Progress, Raw

DEFAULT_CLASS_SIZE = 1_000  # minimum number of items per class if the user gives none
PSEUDO_LABEL_BATCH = 1_000  # unlabelled items that are classified at a time
MIN_ROUND, MAX_ROUND = 200, 4_000  # generated items per round
MAX_TRIES_PER_ITEM = 50  # maximum number of items generated per missing item of a class
MIN_MISSING = 4  # the limit assumes at least this many missing items per class
RATE_TRIES = 1_000  # generated items of a class after which its acceptance rate is checked
MAX_TRIES_PER_SUCCESS = 200  # the class is given up if fewer than one in this many was accepted


@dataclass
class LabelledItems:
    """N items that have a class each.

    Attributes:
        items: The items.
        metadata: A row per item, with its class.
    """

    items: Items
    metadata: list[dict[str, Any]]


@dataclass
class LabelledSource(LabelledItems):
    """The labelled items of a source, and what is needed to add others.

    Attributes:
        model: The model.
        labeler: Classifies unlabelled and generated items.
        unlabelled: Data sets, each with the indices of its unlabelled items.
        statistics: Number of unlabelled items, and notes of the reader.
    """

    model: Model
    labeler: Labeler
    unlabelled: list[tuple[Dataset, Tensor]]
    statistics: dict[str, Any]

    def shortfall(self, size: int | None) -> Tensor:
        """Number of items that each class lacks (K,); classes without any labelled item lack none.

        `size` is the requested number of items per class; None: that of the largest class, at least
        `DEFAULT_CLASS_SIZE`.
        """
        counts = _class_counts(self.labeler.labels, len(self.labeler.names))
        size = max(DEFAULT_CLASS_SIZE, int(counts.max())) if size is None else size
        return (size - counts).clamp_min(0).where(counts > 0, 0)


def read_labelled(
    model: Path | str | Model,
    loaded: Model,
    source: str | Path,
    unlabelled: Path | str | None,
    target: str | None,
    overrides: Sequence[str],
    skip_bad: bool,
    progress: Progress | None,
) -> LabelledSource:
    """Read the labelled source and further unlabelled items, and check that there are at least two classes."""
    modality, config = loaded.modality, loaded.config
    labelable = require(loaded, Labelable[Any], "augment")

    def read(path: str | Path, labels: bool = True) -> Dataset:
        settings = source_settings(model, overrides, skip_bad, labels)
        data = read_parts(modality, str(path), settings, overrides, config.spec)[0]
        modality.check_compatible(display_name(model), config.shape, config.spec, path, data)
        return data

    data = given = read(source)
    if data.labels is not None and config.label_names:
        given = data.relabel(model_labels(loaded, data), config.label_names, data.notes)
    further = [] if unlabelled is None else [_without_labels(read(unlabelled, labels=False))]
    labeler = labelable.labeler(given, further, config.label_names, target, str(loaded.device), progress)
    labelled = (labeler.labels != UNKNOWN).nonzero().flatten()
    if len({int(k) for k in labeler.labels[labelled]}) < 2:
        found = "one class only" if len(labelled) else "no labels"
        raise UserError(f"{source}: has {found}; items of two classes or more are needed", code=1)
    unlabelled_items = [(data, (labeler.labels == UNKNOWN).nonzero().flatten())]
    unlabelled_items += [(other, torch.arange(len(other))) for other in further]
    count = sum(len(index) for _, index in unlabelled_items)
    metadata = _with_labels(loaded, labeler, data, labelled, labeler.labels[labelled])
    statistics = ({"unlabelled": count} if count else {}) | ({"notes": data.notes} if data.notes else {})
    items = batch_items(data, _integers(labelled))
    return LabelledSource(items, metadata, loaded, labeler, unlabelled_items, statistics)


def _without_labels(data: Dataset) -> Dataset:
    """The same items without labels."""
    return data.relabel(None, list(data.label_names), data.notes)


def _with_labels(model: Model, labeler: Labeler, data: Dataset, index: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Metadata of the items `index` (B,), with these class numbers (B,) as labels."""
    name, values = _label_name(model), model.modality.label_values(labeler.names)
    old_name = matching_name(model.conditioner, data, name)
    metadata = item_metadata(model.modality, data, _integers(index))
    for row, k in zip(metadata, labels, strict=True):
        if old_name != name:
            row.pop(old_name, None)
        row[name] = values[int(k)]
    return metadata


def _label_name(model: Model) -> str:
    """The name of the classes in the metadata."""
    return model.conditioner.primary_label or LABEL


def pseudo_label(
    labelled: LabelledSource, shortfall: Tensor, seed: int, progress: Progress | None
) -> tuple[LabelledItems, Tensor]:
    """Unlabelled items with a confident prediction, in random order, until all classes are full; and the new shortfall.

    Args:
        labelled: The labeler and the unlabelled items.
        shortfall: Number of items that each class lacks (K,).
        seed: Seed of the order.
        progress: Called with the stage, the amount done, and the total.
    """
    labeler, total = labelled.labeler, int(shortfall.sum())
    parts, metadata = [labelled.items[:0]], list[dict[str, Any]]()
    for data, index in _shuffled_batches(labelled.unlabelled, seed):
        if not shortfall.any():
            break
        items = batch_items(data, _integers(index))
        labels = labeler.pseudo_label(items)
        chosen = _first_of_each_class(labels, shortfall)
        chosen = chosen[~labeler.duplicates.filter_generated(labeler.embed(items.select(chosen)))]
        shortfall = shortfall - _class_counts(labels[chosen], len(shortfall))
        parts.append(items.select(chosen))
        rows = _with_labels(labelled.model, labeler, data, index[chosen], labels[chosen])
        metadata += [row | {"guessed": True} for row in rows]
        report_progress(progress, "pseudo-label", total - int(shortfall.sum()), total)
    return LabelledItems(Items.concat(parts), metadata), shortfall


def _shuffled_batches(unlabelled: Sequence[tuple[Dataset, Tensor]], seed: int) -> Iterator[tuple[Dataset, Tensor]]:
    """Shuffled indices of each data set, `PSEUDO_LABEL_BATCH` at a time."""
    for data, index in unlabelled:
        shuffled = index[torch.randperm(len(index), generator=step_generator(seed, "guess", 0))]
        for first in range(0, len(shuffled), PSEUDO_LABEL_BATCH):
            yield data, shuffled[first : first + PSEUDO_LABEL_BATCH]


@dataclass
class ItemGenerator:
    """Generates items of requested classes; item i has the noise of its number."""

    model: Model
    labeler: Labeler
    sampling: Sampling
    seed: int
    batch: int

    def __call__(self, numbers: Sequence[int], labels: Tensor | None) -> Items:
        """The items with these N numbers and classes (N,), split between processes.

        Other conditions of the model are those of training items of the same class.
        """
        raw, local = self.conditions(numbers, labels), shard(len(numbers))
        raw_local = raw.select(torch.tensor(local, dtype=torch.int64))
        own = [numbers[i] for i in local]
        latents = sample_latents(self.model, own, raw_local, self.sampling, self.seed, self.batch)
        empty = Items(torch.empty(0, *self.model.config.shape))  # a process may have no items
        return gather(Items.concat([empty, *map(self.model.decode, latents)]), len(numbers))

    def conditions(self, numbers: Sequence[int], labels: Tensor | None) -> Raw:
        """The conditions of the items with these N numbers and classes (N,)."""
        conditioner = self.model.conditioner
        name = conditioner.primary_label
        known = Raw() if labels is None or name is None else Raw({name: labels})
        return complete_conditions(conditioner, known, numbers, self.seed)


@dataclass
class Generated:
    """Accepted generated items.

    Attributes:
        items: Accepted items.
        labels: Their classes (N,).
        numbers: Their item numbers.
        tried: Number of generated items.
        rejected: Number of rejected items by reason.
        shortfall: Number of items that each class lacks in the end.
    """

    items: Items
    labels: Tensor
    numbers: list[int] = field(default_factory=list[int])
    tried: int = 0
    rejected: Counter[str] = field(default_factory=Counter[str])
    shortfall: list[int] = field(default_factory=list[int])

    def add(self, items: Items, labels: Tensor, numbers: Sequence[int], chosen: Tensor) -> None:
        """Accept the `chosen` (K,) of N items."""
        self.items = Items.concat([self.items, items.select(chosen)])
        self.labels = torch.cat([self.labels, labels[chosen]])
        self.numbers += [numbers[i] for i in _integers(chosen)]

    def metadata(self, generate: ItemGenerator) -> list[dict[str, Any]]:
        """A row per item: its conditions, number and settings."""
        if not self.numbers:
            return []
        model, labeler = generate.model, generate.labeler
        raw = generate.conditions(self.numbers, self.labels if labeler.conditional else None)
        name, values = _label_name(model), model.modality.label_values(labeler.names)
        settings = vars(generate.sampling) | {"seed": generate.seed}
        rows = condition_metadata(model, raw, len(self.numbers))
        items = zip(rows, self.labels, self.numbers, strict=True)
        return [row | {name: values[int(k)], "item": i, **settings} for row, k, i in items]

    def statistics(self, labeler: Labeler) -> dict[str, Any]:
        """How many items were accepted, generated, rejected and are still missing."""
        shortfall = {name: count for name, count in zip(labeler.names, self.shortfall, strict=True) if count}
        counts = {"made": len(self.items), "tried": self.tried, "refused": dict(self.rejected)}
        return counts | ({"short": shortfall} if shortfall else {})


def fill_classes(generate: ItemGenerator, shortfall: Tensor, progress: Progress | None) -> Generated:
    """Generate items until every class is full or given up.

    A class is given up after `MAX_TRIES_PER_ITEM` tries per missing item, or earlier if after `RATE_TRIES` its
    acceptance rate is too low.

    Args:
        generate: Generator of items, and the labeler that accepts them.
        shortfall: Number of items that each class lacks (K,).
        progress: Called with the stage, the amount done, and the total.
    """
    total, labeler = int(shortfall.sum()), generate.labeler
    limit = MAX_TRIES_PER_ITEM * shortfall.clamp_min(MIN_MISSING)
    accepted, tried = torch.zeros(len(shortfall)), torch.zeros(len(shortfall))  # items per class
    generated = Generated(Items(torch.empty(0, *generate.model.config.shape)), torch.empty(0, dtype=torch.long))
    while (needed := _next_tries(shortfall, accepted, tried, limit)).any():
        requested = _requested_labels(needed) if labeler.conditional else None
        size = int(needed.max().clamp(MIN_ROUND, MAX_ROUND)) if requested is None else len(requested)
        numbers = range(generated.tried, generated.tried + size)
        items = generate(numbers, requested)
        labels = _accepted_labels(labeler, items, requested, shortfall, generated.rejected)
        accepted += _class_counts(labels, len(shortfall))
        tried += size if requested is None else _class_counts(requested, len(shortfall))
        chosen = _first_of_each_class(labels, shortfall)
        duplicate = labeler.duplicates.filter_generated(labeler.embed(items.select(chosen)))
        generated.rejected["double"] += int(duplicate.sum())
        generated.add(items, labels, numbers, chosen[~duplicate])
        generated.tried += size
        shortfall = shortfall - _class_counts(labels[chosen[~duplicate]], len(shortfall))
        report_progress(progress, "augment", total - int(shortfall.sum()), total)
    generated.shortfall = _integers(shortfall)
    return generated


def _next_tries(shortfall: Tensor, accepted: Tensor, tried: Tensor, limit: Tensor) -> Tensor:
    """Number of items of each class to generate next (K,), at most `RATE_TRIES`; 0 for full and given-up classes.

    Args:
        shortfall: Number of missing items (K,).
        accepted: Number of accepted items (K,).
        tried: Number of generated items (K,).
        limit: Maximum number of generated items (K,).
    """
    needed = (shortfall * (tried + 1) / (accepted + 1)).ceil().clamp_max(RATE_TRIES).minimum(limit - tried)
    rare = (tried >= RATE_TRIES) & (accepted * MAX_TRIES_PER_SUCCESS < tried)
    return needed.masked_fill(rare, 0).clamp_min(0).long()


def _requested_labels(needed: Tensor) -> Tensor:
    """Class numbers with `needed` (K,) of each class, scaled down to about `MAX_ROUND` in all, in alternating order."""
    share = min(1.0, MAX_ROUND / int(needed.sum()))
    counts = [math.ceil(int(count) * share) for count in needed]
    ranked = sorted((rank, k) for k, count in enumerate(counts) for rank in range(count))
    return torch.tensor([k for _, k in ranked])


def _accepted_labels(
    labeler: Labeler, items: Items, requested: Tensor | None, shortfall: Tensor, rejected: Counter[str]
) -> Tensor:
    """The class of each item (N,), `UNKNOWN` for rejected items and full classes; counts rejections by reason."""
    labels = labeler.predict(items)
    accepted = labels != UNKNOWN if requested is None else labels == requested
    rejected["label"] += int((~accepted).sum())
    accepted &= shortfall[labels] > 0
    index = accepted.nonzero().flatten()
    copied = labeler.duplicates.of_real(labeler.embed(items.select(index)))
    rejected["copy"] += int(copied.sum())
    accepted[index[copied]] = False
    return torch.where(accepted, labels, UNKNOWN)


def _integers(values: Tensor) -> list[int]:
    """The integers of a tensor (N,)."""
    return [int(value) for value in values]


def _class_counts(labels: Tensor, classes: int) -> Tensor:
    """Number of items of each class (K,)."""
    return torch.bincount(labels[labels != UNKNOWN], minlength=classes)


def _first_of_each_class(labels: Tensor, limit: Tensor) -> Tensor:
    """Indices (M,) of the first items of each class, at most `limit` (K,) of it, in order."""
    parts = [(labels == k).nonzero().flatten()[: int(count)] for k, count in enumerate(limit)]
    return torch.cat(parts).sort().values
