"""Image data sets of the Hugging Face hub, by the optional `datasets` package."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sfumato.data.conditions import LABEL
from sfumato.data.files import Files
from sfumato.data.metadata import HELD_OUT_FOLDERS, TEXT_KEYS, check_column
from sfumato.errors import UserError

ReadT = TypeVar("ReadT")


def read_hub(source: str, read_files: Callable[[Files], ReadT], label_column: Sequence[str] = ()) -> ReadT:
    """Read hf://owner/name as files: each split is a folder of images, and its columns are a metadata file.

    Args:
        source: The address; `hf://owner/name@config` selects a configuration.
        read_files: Reads the data set from its files.
        label_column: Columns of the metadata besides `label` and the captions.

    Raises:
        UserError: The package is missing, or the data set cannot be loaded, or has no images or lacks a column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: needs the datasets package: pip install 'sfumato[data]'", code=1) from error
    name, _, config = source.removeprefix("hf://").partition("@")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # the network, the hub or a broken repository may raise anything
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: cannot be loaded from the hub ({line})", code=1) from error
    held = next((part for part in HELD_OUT_FOLDERS if part in splits), None)
    train = "train" if "train" in splits else next(iter(splits))
    parts = {"train": splits[train]} | ({"test": splits[held]} if held and held != train else {})
    return read_files(_listing(source, parts, label_column))


def _listing(source: str, parts: dict[str, Any], label_column: Sequence[str]) -> Files:
    """The rows of each split as image files, and a metadata file with their labels and texts."""
    import datasets

    table = next(iter(parts.values()))
    image = next((key for key, feature in table.features.items() if isinstance(feature, datasets.Image)), None)
    if image is None:
        raise UserError(f"{source}: has no image column; found {', '.join(table.features)}", code=1)
    for name in label_column:
        check_column(name, [key for key in table.features if key != image], source)
    raw = {part: rows.cast_column(image, datasets.Image(decode=False)) for part, rows in parts.items()}
    index = {f"{part}/{i:08d}.png": (part, i) for part, rows in raw.items() for i in range(len(rows))}
    metadata = "metadata.jsonl"
    lines = _metadata(parts, image, (LABEL, *TEXT_KEYS, *label_column))

    def read(name: str) -> bytes:
        if name == metadata:
            return lines
        part, i = index[name]
        cell = raw[part][i][image]
        if cell is None:
            raise UserError(f"{source}: no image in row {i} of {part}", code=1)
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    stamp = "-".join(str(getattr(rows, "_fingerprint", "")) for rows in parts.values())
    names = [metadata, *index]
    offsets = {name: i for i, name in enumerate(names)}  # makes one thread read: Arrow tables are not thread-safe
    return Files(Path(source), names, read, f"{source} {stamp}", offsets)


def _metadata(parts: dict[str, Any], image: str, names: Sequence[str]) -> bytes:
    """JSON lines of file name and columns; a class has its name, or none if it is withheld (-1)."""
    lines = []
    for part, rows in parts.items():
        columns = [key for key in dict.fromkeys(names) if key in rows.features and key != image]
        classes = {key: rows.features[key].names for key in columns if getattr(rows.features[key], "names", None)}
        for i, row in enumerate(rows.select_columns(columns) if columns else [{}] * len(rows)):
            numbers = {key: value for key, value in row.items() if key in classes and isinstance(value, int)}
            named = {key: classes[key][value] if value >= 0 else None for key, value in numbers.items()}
            lines.append(json.dumps({"file_name": f"{part}/{i:08d}.png", **row, **named}, default=str))
    return "\n".join(lines).encode()
