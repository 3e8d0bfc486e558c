"""What the tasks share that change given items: reading them, their labels, going through them, writing the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.config import DataSettings
from sfumato.data import Data, renumbered, save_picture
from sfumato.errors import UserError
from sfumato.model import Model
from sfumato.tasks.common import (
    Collected,
    Progress,
    gathered,
    is_main,
    label_values,
    shard,
    source_settings,
    tell,
    title,
)
from sfumato.types import UNKNOWN

SHOWN = 32  # pairs on a sheet
T = TypeVar("T")


@dataclass
class Inputs:
    """The items of a source, in parts that follow one another, and how they were read."""

    source: str
    parts: list[Data]
    settings: DataSettings

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, items: Sequence[int]) -> Tensor:
        """The items (B, ...) of rising numbers."""
        taken: list[Tensor] = []
        first = 0
        for data in self.parts:
            taken.append(data.batch([i - first for i in items if first <= i < first + len(data)]).data)
            first += len(data)
        return torch.cat(taken)

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each item."""
        return [row for data in self.parts for row in rows_of(data, range(len(data)))]

    def told(self) -> dict[str, Any]:
        """What there is to say of how they were read."""
        notes = [note for data in self.parts for note in data.notes]
        return {"notes": list(dict.fromkeys(notes))} if notes else {}

    def labels(self, model: Model) -> Tensor | None:
        """The model's class number of each item (N,); None where there are no labels, or the model knows none."""
        if not model.conditioner.classes or self.parts[0].labels is None:
            return None
        return torch.tensor(np.concatenate([known_classes(model, data) for data in self.parts]))


def known_classes(model: Model, data: Data) -> NDArray[np.int64]:
    """The model's class number of each item (N,) that has a label; a class that the model does not know raises."""
    if data.labels is None:
        return np.full(len(data), UNKNOWN)
    there = set(data.labels.tolist())
    numbers = [model.class_number(name) if k in there else UNKNOWN for k, name in enumerate(data.label_names)]
    return renumbered(data.labels, numbers)


def rows_of(data: Data, index: Sequence[int]) -> list[dict[str, Any]]:
    """What is known of some originals: the file each is from, its label, its text."""
    values, rows = label_values(data.label_names), list[dict[str, Any]]()
    for i in index:
        row: dict[str, Any] = {}
        if data.names is not None:
            row["source"] = data.names[i]
        if data.labels is not None and data.labels[i] != UNKNOWN:
            row["label"] = values[int(data.labels[i])]
        if data.captions is not None:
            row["text"] = data.captions[i]
        rows.append(row)
    return rows


def offered(model: Model, part: T | None, task: str) -> T:
    """A part of the model's modality, which the task cannot do without."""
    if part is None:
        raise UserError(f"{task}: not for a model of this modality ({model.modality.name})")
    return part


def read_inputs(
    model: Path | str | Model, loaded: Model, source: str | Path, overrides: Sequence[str], skip_bad: bool
) -> Inputs:
    """Every item of a source, of the kind that the model makes.

    Args:
        model: The model as the user named it; its run tells how sources are read.
        loaded: The model.
        source: Where the items are.
        overrides: Settings of the data, as `data.resolution=64`.
        skip_bad: Whether files that cannot be read are left out.
    """
    settings = source_settings(model, overrides, skip_bad, labels=False)
    row, card = loaded.modality, loaded.card
    data, held = row.parts(str(source), settings, card.mode)
    row.check_fit(title(model), card.shape, card.mode, source, data)
    return Inputs(str(source), [data] if held is None else [data, held], settings)


def check_whole(model: Model, inputs: Inputs) -> None:
    """Refuse items that have no latent of their own, and so no noise that could be found by inversion."""
    if model.modality.check_whole is not None:
        model.modality.check_whole(inputs.source, inputs.parts, model.card.mode)


def class_numbers(model: Model, label: str | None, inputs: Inputs) -> Tensor | None:
    """Class numbers (N,): of the class called `label`, or else what the source says."""
    return inputs.labels(model) if label is None else torch.full((len(inputs),), model.class_number(label))


def picked(labels: Tensor | None, items: Sequence[int]) -> Tensor | None:
    """The labels (B,) of some items, if there are labels."""
    return None if labels is None else labels[list(items)]


@torch.no_grad()
def changed(
    model: Model,
    inputs: Inputs,
    change: Callable[[list[int], Tensor], Tensor],
    batch: int,
    stage: str,
    progress: Progress | None,
) -> Tensor:
    """All items (N, ...) as `change` makes them of (their numbers, the items (B, ...)), in all processes."""
    mine = shard(len(inputs))
    parts = Collected(len(mine), model.card.shape)
    for first in range(0, len(mine), batch):
        items = mine[first : first + batch]
        parts.append(change(items, inputs.take(items)))
        tell(progress, stage, first + len(items), len(mine))
    return gathered(parts.items, len(inputs))


def changed_rows(model: Model, inputs: Inputs, new: Tensor | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per item: the new label in place of its own, which is kept as `source_label`; and facts of the whole.

    `new` (N,) are class numbers; an item whose number is `UNKNOWN` stays without a label.
    """
    rows = inputs.rows()
    values = label_values(model.card.label_names)
    for i, row in enumerate(rows):
        if new is not None and int(new[i]) != UNKNOWN:
            row |= {"source_label": row["label"]} if "label" in row else {}
            row["label"] = values[int(new[i])]
    return [row | facts for row in rows]


def deliver(
    model: Model,
    inputs: Inputs,
    items: Tensor,
    rows: list[dict[str, Any]],
    out: Path | None,
    sheet: Path | None,
    overwrite: bool,
    write: Callable[[Tensor], None] | None = None,
) -> None:
    """Write items (N, ...) with their facts, and a sheet of pairs: some originals, each beside what became of it.

    `write` is what writes the items, if not what writes new ones.
    """
    if not is_main():
        return
    if out is not None and write is not None:
        write(items)
    elif out is not None:
        model.modality.write(out, items, rows, model.card.mode, overwrite)
    if sheet is not None:
        shown = list(range(0, len(inputs), -(-len(inputs) // SHOWN)))
        save_picture(model.modality.pairs(inputs.take(shown), items[shown], model.card.mode), sheet)
