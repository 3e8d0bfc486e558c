"""The table of modalities. A new one is a reader, a codec, a writer, and one row here (or `sfumato.register(row)`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.choice import choose
from sfumato.codecs import Codec, ImageCodec
from sfumato.config import DataSettings
from sfumato.data import Data, animation, read_images, read_masks, read_source, sample_sheet, write_images


@dataclass(frozen=True)
class Modality:
    """One row: everything that is particular to one kind of data.

    Args:
        name: As in `--modality`.
        recognises: Whether a source looks like this kind.
        read: Source and data settings -> (training part, held-out part).
        codec: The codec's class; its constructor's arguments are stored in `codec/config.json`.
        write: (folder, items (N, ...), a row of facts per item, mode, overwrite) -> the files.
        sheet: (items (N, ...), columns or None) -> a picture to look at.
        read_all: Source and data settings -> every item, in parts that follow one another. None: no task changes items.
        masks: (mask file or folder, source, its parts, data settings) -> (N, *axes of an item) bool, true where an item
            is to be made anew. None: items have no parts that could be.
        animation: File -> what writes items (N, ...) into it, one after the other. None: they cannot be shown so.
    """

    name: str
    recognises: Callable[[str], bool]
    read: Callable[[str, DataSettings], tuple[Data, Data]]
    codec: Callable[..., Codec]
    write: Callable[[Path, Tensor, list[dict[str, Any]], str, bool], None]
    sheet: Callable[[Tensor, int | None], Any]
    read_all: Callable[[str, DataSettings], list[Data]] | None = None
    masks: Callable[[Path, str, Sequence[Data], DataSettings], Tensor] | None = None
    animation: Callable[[Path], Callable[[Tensor], None]] | None = None


def _read_images(source: str, settings: DataSettings) -> tuple[Data, Data]:
    return read_source(
        source,
        resolution=settings.resolution,
        mode=settings.mode,
        label_from=settings.label_from,
        skip_bad=settings.skip_bad,
        held_out=settings.held_out,
    )


def _read_all_images(source: str, settings: DataSettings) -> list[Data]:
    train, held = read_images(
        source,
        resolution=settings.resolution,
        mode=settings.mode,
        label_from=settings.label_from,
        skip_bad=settings.skip_bad,
    )
    return [train] if held is None else [train, held]


def _read_masks(place: Path, source: str, parts: Sequence[Data], settings: DataSettings) -> Tensor:
    return read_masks(place, source, parts, resolution=settings.resolution)


def _write_images(out: Path, items: Tensor, rows: list[dict[str, Any]], mode: str, overwrite: bool) -> None:
    write_images(out, items, rows, mode=mode, overwrite=overwrite)


MODALITIES: dict[str, Modality] = {
    "image": Modality(
        "image",
        lambda source: True,
        _read_images,
        ImageCodec,
        _write_images,
        sample_sheet,
        read_all=_read_all_images,
        masks=_read_masks,
        animation=animation,
    ),
}


def register(row: Modality) -> None:
    """Add a modality from outside the package, in front of those that are there."""
    rows = {row.name: row, **MODALITIES}
    MODALITIES.clear()
    MODALITIES.update(rows)


def find_modality(name: str) -> Modality:
    """The row called `name`."""
    return choose(MODALITIES, "modality", name)


def recognise(source: str) -> Modality:
    """The first row that recognises what is there."""
    return next(row for row in MODALITIES.values() if row.recognises(source))
