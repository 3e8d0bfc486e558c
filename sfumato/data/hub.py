"""Data sets of the Hugging Face hub, through the optional `datasets` package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import Parts
from .files import Files

_HELD = ("test", "validation", "val", "valid")


def read_hub(source: str, read_files: Callable[[Files], Parts]) -> Parts:
    """Images of hf://owner/name, read as if its splits were folders and its columns a metadata file.

    Args:
        source: The address; `hf://owner/name@config` picks a configuration.
        read_files: Reads a listing of files.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: needs the datasets package: pip install 'sfumato[data]'", code=1) from error
    name, _, config = source.removeprefix("hf://").partition("@")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever the network, the hub or a broken repository may raise
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: cannot be loaded from the hub ({line})", code=1) from error
    held = next((part for part in _HELD if part in splits), None)
    train = "train" if "train" in splits else next(iter(splits))
    parts = {"train": splits[train]} | ({"test": splits[held]} if held and held != train else {})
    return read_files(_listing(source, parts))


def _listing(source: str, parts: dict[str, Any]) -> Files:
    """A listing whose files are the rows of each split, beside a metadata file that holds label and text."""
    import datasets

    table = next(iter(parts.values()))
    image = next((key for key, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(f"{source}: has no image column; found {', '.join(table.features)}", code=1)
    raw = {part: rows.cast_column(image, datasets.Image(decode=False)) for part, rows in parts.items()}
    where = {f"{part}/{i:08d}.png": (part, i) for part, rows in raw.items() for i in range(len(rows))}
    metadata = "metadata.jsonl"
    lines = _metadata(parts, image)

    def read(name: str) -> bytes:
        if name == metadata:
            return lines
        part, i = where[name]
        cell = raw[part][i][image]
        if cell is None:
            raise UserError(f"{source}: no image in row {i} of {part}", code=1)
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    stamp = "-".join(str(getattr(rows, "_fingerprint", "")) for rows in parts.values())
    place = {name: i for i, name in enumerate([metadata, *where])}  # one reader: Arrow tables are not for threads
    return Files(Path(source), [metadata, *where], read, f"{source} {stamp}", place)


def _metadata(parts: dict[str, Any], image: str) -> bytes:
    """JSON lines of file_name, label (by its name) and text."""
    import json

    lines = []
    for part, rows in parts.items():
        columns = [key for key in ("label", "text", "caption", "prompt") if key in rows.features and key != image]
        names = getattr(rows.features.get("label"), "names", None)
        for i, row in enumerate(rows.select_columns(columns) if columns else [{}] * len(rows)):
            if names and isinstance(row.get("label"), int):
                row = {**row, "label": names[row["label"]] if row["label"] >= 0 else None}  # -1: it is kept secret
            lines.append(json.dumps({"file_name": f"{part}/{i:08d}.png", **row}))
    return "\n".join(lines).encode()
