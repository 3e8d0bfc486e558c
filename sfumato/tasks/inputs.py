"""What the tasks share that change given items: reading them, their labels, going through them, writing the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.config import DataSettings
from sfumato.data import Data
from sfumato.errors import UserError
from sfumato.model import Model
from sfumato.tasks.common import (
    Progress,
    gathered,
    is_main,
    label_values,
    save_picture,
    shard,
    source_settings,
    tell,
    title,
)

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
        return [row_of(data, i) for data in self.parts for i in range(len(data))]

    def labels(self, model: Model) -> Tensor | None:
        """The model's class number of each item (N,); None where there are no labels, or the model knows none."""
        if not model.conditioner.classes or self.parts[0].labels is None:
            return None
        names = [data.label_names[int(k)] for data in self.parts if data.labels is not None for k in data.labels]
        numbers = {name: model.class_number(name) for name in dict.fromkeys(names)}
        return torch.tensor([numbers[name] for name in names])


def row_of(data: Data, i: int) -> dict[str, Any]:
    """What is known of an original: the file it is from, its label, its text."""
    row: dict[str, Any] = {}
    if data.names is not None:
        row["source"] = data.names[i]
    if data.labels is not None:
        row["label"] = label_values(data.label_names)[int(data.labels[i])]
    if data.captions is not None:
        row["text"] = data.captions[i]
    return row


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


def class_numbers(model: Model, label: str | None, inputs: Inputs) -> Tensor | None:
    """Class numbers (N,): of the class called `label`, or else what the source says."""
    return inputs.labels(model) if label is None else torch.full((len(inputs),), model.class_number(label))


def picked(labels: Tensor | None, items: Sequence[int]) -> Tensor | None:
    """The labels (B,) of some items, if there are labels."""
    return None if labels is None else labels[list(items)]


def check_places(model: Model, out: Path | None, sheet: Path | None, overwrite: bool) -> Path | None:
    """Refuse places that cannot be written to, before any work is done; the sheet's is next to `out` by default."""
    if out is None:
        return sheet
    model.modality.check_target(Path(out), overwrite)
    return sheet_beside(Path(out), overwrite) if sheet is None else sheet


def sheet_beside(out: Path, overwrite: bool) -> Path:
    """OUT-sheet.png, unless there is one that must stay."""
    sheet = out.absolute().with_name(out.absolute().name + "-sheet.png")
    if sheet.exists() and not overwrite:
        raise UserError(f"{sheet}: exists; replace it with --overwrite, or name another file with --sheet")
    return sheet


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
    parts = [torch.empty(0, *model.card.shape)]  # a process may have no items
    for first in range(0, len(mine), batch):
        items = mine[first : first + batch]
        parts.append(change(items, inputs.take(items)))
        tell(progress, stage, first + len(items), len(mine))
    return gathered(torch.cat(parts), len(inputs))


def changed_rows(model: Model, inputs: Inputs, new: Tensor | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per item: the new label in place of its own, which is kept as `source_label`; and facts of the whole."""
    rows = inputs.rows()
    values = label_values(model.card.label_names)
    for i, row in enumerate(rows):
        if new is not None:
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
) -> None:
    """Write items (N, ...) with their facts, and a sheet of pairs: some originals, each beside what became of it."""
    if not is_main():
        return
    if out is not None:
        model.modality.write(out, items, rows, model.card.mode, overwrite)
    if sheet is not None:
        shown = list(range(0, len(inputs), -(-len(inputs) // SHOWN)))
        save_picture(model.modality.pairs(inputs.take(shown), items[shown], model.card.mode), sheet)
