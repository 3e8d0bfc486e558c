"""The table of modalities. A new modality is a folder here, or an object that is passed to `sfumato.register`."""

from typing import Any

from sfumato.modalities.base import Modality
from sfumato.modalities.image.modality import ImageModality
from sfumato.modalities.table.modality import TableModality
from sfumato.registry import choose

__all__ = ["MODALITIES", "Modality", "find_modality", "is_builtin", "recognise", "register"]

# in order: the first modality that recognises a source reads it; images recognise every source
MODALITIES: dict[str, Modality[Any]] = {modality.name: modality for modality in (TableModality(), ImageModality())}


def register(modality: Modality[Any]) -> None:
    """Add a modality, or replace the one of the same name; it is asked first whether it recognises a source."""
    others = {name: other for name, other in MODALITIES.items() if name != modality.name}
    MODALITIES.clear()
    MODALITIES.update({modality.name: modality, **others})


def find_modality(name: str) -> Modality[Any]:
    """The modality of this name.

    Raises:
        UserError: The name is not in the table; the nearest one is suggested.
    """
    return choose(MODALITIES, "modality", name)


def is_builtin(source: str) -> bool:
    """Whether a source is the name of a built-in data set of any modality."""
    return any(modality.is_builtin(source) for modality in MODALITIES.values())


def recognise(source: str) -> Modality[Any]:
    """The first modality in the table that recognises a source."""
    return next(modality for modality in MODALITIES.values() if modality.recognises(source))
