"""What `augment` is made of: given items, open ones whose class is sure, made ones until every class is full."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.core import step_generator
from sfumato.data import Data
from sfumato.errors import UserError
from sfumato.modality import Sorter
from sfumato.model import Model, Sampling
from sfumato.tasks.common import Progress, drawn, gathered, label_values, shard, source_settings, tell, title
from sfumato.tasks.inputs import known_classes, offered, rows_of
from sfumato.types import UNKNOWN

LEAST = 1_000  # items of each class, unless told otherwise
CHUNK = 1_000  # open items looked at at once
ROUND, LARGEST = 200, 4_000  # items tried at once
MOST_TRIED = 50  # for each item that is needed of a class
FEW = 4  # items that a class is taken to need at least, when it is given up after so many
ENOUGH, RAREST = 1_000, 200  # a class is given up as well after so many, if fewer than one in so many was good


@dataclass
class Given:
    """The given items that have a label (N, ...), a row of facts for each, and who sorts others beside them.

    `open` holds what has no label: data sets, with the numbers of such items in each.
    """

    items: Tensor
    rows: list[dict[str, Any]]
    sorter: Sorter
    open: list[tuple[Data, Tensor]]
    facts: dict[str, Any]

    def short(self, wanted: int | None) -> Tensor:
        """How many items each class lacks (K,) of `wanted` (default: of the largest, at least `LEAST`).

        Of classes that none is given of nothing is lacking.
        """
        counts = _counted(self.sorter.labels, len(self.sorter.names))
        wanted = max(LEAST, int(counts.max())) if wanted is None else wanted
        return (wanted - counts).clamp_min(0).where(counts > 0, 0)


def read_given(
    model: Path | str | Model,
    loaded: Model,
    source: str | Path,
    unlabelled: Path | str | None,
    target: str | None,
    overrides: Sequence[str],
    skip_bad: bool,
    progress: Progress | None,
) -> Given:
    """Read what is given, and check that classes can be made of it."""
    row, card = loaded.modality, loaded.card
    make_sorter = offered(loaded, row.sorter, "augment")

    def read(place: str | Path, labels: bool = True) -> Data:
        settings = source_settings(model, overrides, skip_bad, labels)
        data = row.parts(str(place), settings, card.mode)[0]
        row.check_fit(title(model), card.shape, card.mode, place, data)
        return data

    data = read(source)
    if data.labels is not None and card.label_names:
        data = replace(data, labels=known_classes(loaded, data), label_names=card.label_names)
    others = [] if unlabelled is None else [replace(read(unlabelled, labels=False), labels=None)]
    sorter = make_sorter(data, others, card.label_names, target, str(loaded.device), progress)
    known = (sorter.labels != UNKNOWN).nonzero().flatten()
    if len({int(k) for k in sorter.labels[known]}) < 2:
        found = "one class only" if len(known) else "no labels"
        raise UserError(f"{source}: has {found}; items of two classes or more are needed", code=1)
    free = (sorter.labels == UNKNOWN).nonzero().flatten()
    loose = [(data, free), *((other, torch.arange(len(other))) for other in others)]
    count = sum(len(index) for _, index in loose)
    values = label_values(sorter.names)
    said = rows_of(data, [int(i) for i in known])
    rows = [row | {"label": values[int(k)]} for row, k in zip(said, sorter.labels[known], strict=True)]
    facts = ({"unlabelled": count} if count else {}) | ({"notes": data.notes} if data.notes else {})
    return Given(data.batch(known).data, rows, sorter, loose, facts)


@dataclass
class Guessed:
    """Open items (N, ...) whose class is sure enough, and a row of facts for each."""

    items: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def guess(given: Given, short: Tensor, seed: int, progress: Progress | None) -> tuple[Guessed, Tensor]:
    """Open items, drawn by lot, until no class is short of any or all have been looked at; and what is short then (K,).

    Args:
        given: Who sorts, and the open items.
        short: Items that each class lacks (K,).
        seed: Of the lot.
        progress: Who shows how far it is.
    """
    sorter, total, values = given.sorter, int(short.sum()), label_values(given.sorter.names)
    found, facts = [given.items[:0]], list[dict[str, Any]]()
    for data, index in _by_lot(given.open, seed):
        if not short.any():
            break
        items = data.batch(index).data
        labels = sorter.guessed(items)
        chosen = _first(labels, short)
        chosen = chosen[~sorter.copies.of_made(sorter.points(items[chosen]))]
        short = short - _counted(labels[chosen], len(short))
        found.append(items[chosen])
        for row, k in zip(rows_of(data, [int(i) for i in index[chosen]]), labels[chosen], strict=True):
            facts.append(row | {"label": values[int(k)], "guessed": True})
        tell(progress, "guess", total - int(short.sum()), total)
    return Guessed(torch.cat(found), facts), short


def _by_lot(open_: Sequence[tuple[Data, Tensor]], seed: int) -> Iterator[tuple[Data, Tensor]]:
    """The items of each data set that are said, `CHUNK` at a time, mixed."""
    for data, index in open_:
        mixed = index[torch.randperm(len(index), generator=step_generator(seed, "guess", 0))]
        for begin in range(0, len(mixed), CHUNK):
            yield data, mixed[begin : begin + CHUNK]


@dataclass
class Maker:
    """Makes items of a model: item i has the noise of its number, whatever is asked of it."""

    model: Model
    sorter: Sorter
    how: Sampling
    seed: int
    batch: int

    def __call__(self, numbers: Sequence[int], asked: Tensor | None) -> Tensor:
        """The items (N, ...) of these numbers, of the classes (N,) asked for, shared out between processes."""
        mine, model = shard(len(numbers)), self.model
        label = None if asked is None else asked[mine]
        latents = drawn(model, [numbers[i] for i in mine], label, self.how, self.seed, self.batch)
        none = torch.empty(0, *model.card.shape)  # a process may have no items
        return gathered(torch.cat([none, *map(model.decode, latents)]), len(numbers))


@dataclass
class Made:
    """Items (N, ...) that were good enough, their classes (N,) and numbers; how many were tried, and refused for what.

    `short` says how many are still missing of a class.
    """

    items: Tensor
    labels: Tensor
    numbers: list[int] = field(default_factory=list[int])
    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])
    short: list[int] = field(default_factory=list[int])

    def add(self, items: Tensor, labels: Tensor, numbers: Sequence[int], chosen: Tensor) -> None:
        """Take in the chosen (K,) of some items (N, ...)."""
        self.items = torch.cat([self.items.to(items), items[chosen]])
        self.labels = torch.cat([self.labels, labels[chosen]])
        self.numbers += [numbers[int(i)] for i in chosen]

    def rows(self, sorter: Sorter, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """A row of facts for each item."""
        values = label_values(sorter.names)
        return [{"label": values[int(k)], "item": i, **facts} for k, i in zip(self.labels, self.numbers, strict=True)]

    def facts(self, sorter: Sorter) -> dict[str, Any]:
        """What there is to say of all of them."""
        short = {name: count for name, count in zip(sorter.names, self.short, strict=True) if count}
        counts = {"made": len(self.items), "tried": self.tried, "refused": dict(self.refused)}
        return counts | ({"short": short} if short else {})


def fill(make: Maker, short: Tensor, progress: Progress | None) -> Made:
    """Make items until no class is short of any, or it is given up.

    It is after `MOST_TRIED` for each item it needs, or as soon as `ENOUGH` show that good ones are too rare.

    Args:
        make: Who makes and who sorts.
        short: Items that each class lacks (K,).
        progress: Who shows how far it is.
    """
    total = int(short.sum())
    most = MOST_TRIED * short.clamp_min(FEW)
    found, tried = torch.zeros(len(short)), torch.zeros(len(short))  # of each class: good ones, and tried for it
    made = Made(torch.empty(0, *make.model.card.shape), torch.empty(0, dtype=torch.long))
    while (needed := _needed(short, found, tried, most)).any():
        asked = _cycled(needed) if make.sorter.asked else None
        size = int(needed.max().clamp(ROUND, LARGEST)) if asked is None else len(asked)
        numbers = range(made.tried, made.tried + size)
        items = make(numbers, asked)
        labels = _sorted(make.sorter, items, asked, short, made.refused)
        found += _counted(labels, len(short))
        tried += size if asked is None else _counted(asked, len(short))
        chosen = _first(labels, short)
        twin = make.sorter.copies.of_made(make.sorter.points(items[chosen]))
        made.refused["double"] += int(twin.sum())
        made.add(items, labels, numbers, chosen[~twin])
        made.tried += size
        short = short - _counted(labels[chosen[~twin]], len(short))
        tell(progress, "augment", total - int(short.sum()), total)
    made.short = [int(count) for count in short]
    return made


def _needed(short: Tensor, found: Tensor, tried: Tensor, most: Tensor) -> Tensor:
    """How many to try next of each class (K,), `ENOUGH` at most: those that should fill it; none of one given up.

    Args:
        short: How many are missing.
        found: How many were good so far, of those tried for the class.
        tried: And how many these are.
        most: How many may be tried in all.
    """
    needed = (short * (tried + 1) / (found + 1)).ceil().clamp_max(ENOUGH).minimum(most - tried)
    rare = (tried >= ENOUGH) & (found * RAREST < tried)
    return needed.masked_fill(rare, 0).clamp_min(0).long()


def _cycled(needed: Tensor) -> Tensor:
    """Class numbers of which `needed` (K,) are of each class, at most `LARGEST` in all, going through the classes."""
    share = min(1.0, LARGEST / int(needed.sum()))
    counts = [math.ceil(int(count) * share) for count in needed]
    ranked = sorted((rank, k) for k, count in enumerate(counts) for rank in range(count))
    return torch.tensor([k for _, k in ranked])


def _sorted(sorter: Sorter, items: Tensor, asked: Tensor | None, short: Tensor, refused: Counter[str]) -> Tensor:
    """The class of each item (N,); `UNKNOWN` of those that are refused, or of a class that is full."""
    labels = sorter.shown(items)
    good = labels != UNKNOWN if asked is None else labels == asked
    refused["label"] += int((~good).sum())
    good &= short[labels] > 0
    index = good.nonzero().flatten()
    copied = sorter.copies.of_real(sorter.points(items[index]))
    refused["copy"] += int(copied.sum())
    good[index[copied]] = False
    return torch.where(good, labels, UNKNOWN)


def _counted(labels: Tensor, classes: int) -> Tensor:
    """How many items there are of each class (K,)."""
    return torch.bincount(labels[labels != UNKNOWN], minlength=classes)


def _first(labels: Tensor, most: Tensor) -> Tensor:
    """The first items of each class, `most` (K,) of it, in their order: (M,)."""
    parts = [(labels == k).nonzero().flatten()[: int(count)] for k, count in enumerate(most)]
    return torch.cat(parts).sort().values
