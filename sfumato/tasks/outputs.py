"""Results of a task: output paths are checked before any work, then items and contact sheet are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.model import Model
    from sfumato.tasks.inputs import SourceItems
    from sfumato.types import Items

ITEMS_PER_SHEET = 100  # items on a contact sheet
PAIRS_PER_SHEET = 32  # pairs of original and result on a contact sheet


@dataclass
class Result:
    """What a task returns.

    Attributes:
        items: Items (N, ...) in the range of the data; `items.stack()` is a tensor of them.
        metadata: A row per item: label, seed, item number, settings.
        seconds: Wall-clock time.
        statistics: Settings and measurements of the whole.
    """

    items: "Items"
    metadata: list[dict[str, Any]]
    seconds: float = 0.0
    statistics: dict[str, Any] = field(default_factory=dict[str, Any])

    def summary(self) -> dict[str, Any]:
        """Number of items, seconds and statistics."""
        return {"items": len(self.items), "seconds": round(self.seconds, 2), **self.statistics}


def check_outputs(
    model: "Model",
    out: Path | None,
    sheet: Path | None,
    overwrite: bool,
    *,
    sources: Sequence[str | Path | None] = (),
    animation: Path | None = None,
    default_sheet: bool = True,
) -> Path | None:
    """Refuse paths that cannot be written or would destroy data; return the path of the sheet.

    Args:
        model: The model, whose modality checks `out`.
        out: Path of the items.
        sheet: Contact sheet; its suffix selects the format.
        overwrite: Whether existing output may be replaced.
        sources: Inputs of the task as the user named them; None is no input.
        animation: Animation file, whose suffix has been checked.
        default_sheet: Whether to write OUT-sheet.png if the user named no sheet.

    Raises:
        UserError: The path, and what to do.
    """
    from sfumato.data.output import check_file_target, picture_format

    out = None if out is None else Path(out)
    if sheet is None and out is not None and default_sheet:
        sheet = out.absolute().with_name(out.absolute().name + "-sheet.png")
    if sheet is not None:
        picture_format(Path(sheet))
    pictures = {flag: Path(file) for flag, file in (("--sheet", sheet), ("--animation", animation)) if file is not None}
    for path in (*([] if out is None else [out]), *pictures.values()):
        _check_not_source(path, sources)
    if out is not None:
        model.modality.check_output(out, overwrite)
    if len({file.resolve() for file in pictures.values()}) < len(pictures):
        raise UserError(f"{sheet}: given for both --sheet and --animation; choose two files")
    for flag, file in pictures.items():
        if out is not None and out.resolve() in file.resolve().parents:
            raise UserError(f"{file}: is inside {out}, where it would be read as an item; choose another {flag}")
        check_file_target(file, overwrite)
    return sheet


def _check_not_source(path: Path, sources: Sequence[str | Path | None]) -> None:
    """Refuse a path that is a source, contains one, or is an existing part of one."""
    from sfumato.modalities import is_builtin

    output = path.resolve()
    for source in sources:
        file = Path(source or "").expanduser()
        if source is None or is_builtin(str(source)) or not file.exists():
            continue
        original = file.resolve()
        if output == original:
            relation = "is the source"
        elif output in original.parents:
            relation = "contains the source"
        elif original in output.parents and output.exists():
            relation = "is part of the source"
        else:
            continue
        raise UserError(f"{path}: exists and {relation} ({source}); choose another path")


def write_items(
    model: "Model",
    items: "Items",
    metadata: list[dict[str, Any]],
    out: Path | None,
    sheet: Path | None,
    overwrite: bool,
    shown: "Items",
) -> None:
    """Write items (N, ...) with their metadata, and a contact sheet of the items `shown`."""
    from sfumato.data.output import save_picture
    from sfumato.distributed import is_main

    if out is not None and is_main():
        model.modality.write(out, items, metadata, model.config.spec, overwrite)
    if sheet is not None and is_main():
        save_picture(model.modality.preview(shown, model.config.spec), sheet)


def write_result(
    model: "Model",
    originals: "SourceItems",
    items: "Items",
    metadata: list[dict[str, Any]],
    out: Path | None,
    sheet: Path | None,
    overwrite: bool,
    write: "Callable[[Items], None] | None" = None,
) -> None:
    """Write items (N, ...) with their metadata, and a contact sheet of originals and results.

    `write` replaces the modality's writer of new items.
    """
    from sfumato.data.output import save_picture
    from sfumato.distributed import is_main

    if not is_main():
        return
    if out is not None and write is not None:
        write(items)
    elif out is not None:
        model.modality.write(out, items, metadata, model.config.spec, overwrite)
    if sheet is not None:
        shown = list(range(0, len(originals), -(-len(originals) // PAIRS_PER_SHEET)))
        save_picture(model.modality.preview(originals.take(shown), model.config.spec, items.select(shown)), sheet)
