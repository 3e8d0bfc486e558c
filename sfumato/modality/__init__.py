"""The table of modalities. A new one is a reader, a codec, a writer, and one row here (or `sfumato.register(row)`)."""

from typing import Any

from sfumato.choice import choose
from sfumato.modality.image import IMAGE
from sfumato.modality.row import Facts, Judge, Modality, Sorter
from sfumato.modality.table import TABLE

__all__ = ["MODALITIES", "Facts", "Judge", "Modality", "Sorter", "find_modality", "recognise", "register"]

# asked in this order whether they recognise a source; the row of images takes whatever is left
MODALITIES: dict[str, Modality[Any]] = {row.name: row for row in (TABLE, IMAGE)}


def register(row: Modality[Any]) -> None:
    """Add a modality from outside the package, in front of those that are there."""
    rows = {row.name: row, **MODALITIES}
    MODALITIES.clear()
    MODALITIES.update(rows)


def find_modality(name: str) -> Modality[Any]:
    """The row called `name`."""
    return choose(MODALITIES, "modality", name)


def recognise(source: str) -> Modality[Any]:
    """The first row that recognises what is there."""
    return next(row for row in MODALITIES.values() if row.recognises(source))
