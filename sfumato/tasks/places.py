"""Where a task's results go: refused before any work is done, where they would be lost or destroy what is there."""

from collections.abc import Sequence
from pathlib import Path

from sfumato.data import BUILTINS, check_file_target, picture_format
from sfumato.errors import UserError
from sfumato.model import Model


def check_places(
    model: Model,
    out: Path | None,
    sheet: Path | None,
    overwrite: bool,
    *,
    sources: Sequence[str | Path | None] = (),
    animation: Path | None = None,
    beside: bool = True,
) -> Path | None:
    """Refuse places that cannot be written to, or where something would be lost; tells where the sheet goes.

    Args:
        model: The model, whose modality knows what `out` may be.
        out: Where the items go.
        sheet: Picture file; its suffix says the format.
        overwrite: Whether what is there may be replaced.
        sources: What the task reads, as the user named it; None is nothing.
        animation: File of moving pictures, whose suffix has been checked.
        beside: Whether there is a sheet next to `out`, OUT-sheet.png, where the user named none.

    Raises:
        UserError: With the place and what to do.
    """
    out = None if out is None else Path(out)
    if sheet is None and out is not None and beside:
        sheet = out.absolute().with_name(out.absolute().name + "-sheet.png")
    if sheet is not None:
        picture_format(Path(sheet))
    pictures = {flag: Path(file) for flag, file in (("--sheet", sheet), ("--animation", animation)) if file is not None}
    for place in (*([] if out is None else [out]), *pictures.values()):
        _check_apart(place, sources)
    if out is not None:
        model.modality.check_target(out, overwrite)
    if len({file.resolve() for file in pictures.values()}) < len(pictures):
        raise UserError(f"{sheet}: is named for both --sheet and --animation; name two files")
    for flag, file in pictures.items():
        if out is not None and out.resolve() in file.resolve().parents:
            raise UserError(f"{file}: lies in {out}, where it would be read as an item; name another file with {flag}")
        check_file_target(file, overwrite)
    return sheet


def _check_apart(place: Path, sources: Sequence[str | Path | None]) -> None:
    """Refuse a place where a source would be replaced: the source itself, what holds it, or what is there of it."""
    here = place.resolve()
    for source in sources:
        given = Path(source or "").expanduser()
        if source is None or str(source) in BUILTINS or not given.exists():
            continue
        there = given.resolve()
        if here == there:
            relation = "it is"
        elif here in there.parents:
            relation = "it holds"
        elif there in here.parents and here.exists():
            relation = "it is a part of"
        else:
            continue
        raise UserError(f"{place}: exists, and {relation} what is read ({source}); name another place")
