"""Labels and captions of files: labels from folders, metadata or file names; captions from metadata or text files."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sfumato.data.files import Files, first_few
from sfumato.errors import UserError
from sfumato.types import UNKNOWN

Row = dict[str, object]
METADATA = ("metadata.jsonl", "metadata.csv")  # file names, lower case
HELD_OUT_FOLDERS = ("test", "validation", "val", "valid")  # folders or splits beside train; the first present is used
TEXT_KEYS = ("text", "prompt", "caption")  # metadata columns of the caption; the first present is used
UNLABELLED = ("unlabelled", "unlabeled")  # folders of files without a label


def _parse_rows(name: str, text: str, path: str) -> list[Row]:
    """The rows of a metadata file, CSV or JSON lines; `path` is quoted in errors."""
    if name.endswith(".csv"):
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg})", code=1) from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: want one object a line, as {{"file_name": "a.png"}}', code=1)
        rows.append(row)
    return rows


def read_metadata(files: Files) -> dict[str, Row] | None:
    """Metadata rows by file name (relative to the root); None without a metadata file."""
    found = [name for name in files.names if PurePosixPath(name).name.lower() in METADATA]
    other = [name for name in files.names if PurePosixPath(name).stem.lower() == "metadata" and name not in found]
    if other and not found:
        raise UserError(f"{files.root}: found {other[0]}, but only {' or '.join(METADATA)} is read: rename it", code=1)
    rows: dict[str, Row] = {}
    for name in found:
        for number, row in enumerate(_parse_rows(name.lower(), files.text(name), f"{files.root}/{name}"), 1):
            file_name = row.get("file_name")
            if not isinstance(file_name, str) or not file_name:
                raise UserError(f"{files.root}/{name}, row {number}: has no file_name", code=1)
            rows[str(PurePosixPath(name).parent / file_name.replace("\\", "/"))] = row
    return rows if found else None


def match_metadata(
    names: Sequence[str], rows: dict[str, Row], files: Files, skip_bad: bool, notes: list[str]
) -> list[str]:
    """The names that have a metadata row.

    Raises:
        UserError: A row names a missing file, or a file has no row; with `skip_bad` both are left out instead.
    """
    present = set(files.names)
    missing = [name for name in rows if name not in present]
    extra = [name for name in names if name not in rows]
    problems = ((missing, "rows of the metadata name a missing file"), (extra, "images are not in the metadata"))
    for unmatched, problem in problems:
        line = f"{files.root}: {len(unmatched)} {problem}: {first_few(unmatched)}"
        if unmatched and not skip_bad:
            raise UserError(f"{line}; correct the metadata, or leave them out with --skip-bad", code=1)
        if unmatched:
            notes.append(f"{line}; left out")
    return [name for name in names if name in rows]


def split_by_folder(names: Sequence[str], notes: list[str]) -> tuple[list[str], list[str]]:
    """Names under train/ and under test/ (or validation/, val/); without such folders all names and none."""
    top = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    held = next((part for part in HELD_OUT_FOLDERS if part in top), None)
    if "train" not in top or held is None:
        return list(names), []
    for part, count in Counter(top).items():
        if part not in ("train", held):
            notes.append(f"{part or 'the root'}: {count} images not used (train/ is for training, {held}/ is held out)")
    train, held_out = ([n for n, t in zip(names, top, strict=True) if t == part] for part in ("train", held))
    return train, held_out


def folder_labels(names: Sequence[str], split: bool, notes: list[str]) -> list[str | None] | None:
    """Label of each file: its first folder below those that all share, and below train/ and test/ if `split`.

    A file in the folder unlabelled/ has None. Without class folders the result is None.
    """
    folders = [PurePosixPath(name).parent.parts[1 if split else 0 :] for name in names]
    shared = 0
    while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    labels = [parts[shared] if len(parts) > shared else "" for parts in folders]
    if not any(labels):
        return None
    if not all(labels):
        notes.append(f"{labels.count('')} images lie in no class folder: folders are not used as classes")
        return None
    return [None if label.lower() in UNLABELLED else label for label in labels]


def labels_from_names(names: Sequence[str], pattern: str) -> list[str]:
    """Label of each file: the first group of a regular expression in its name, or the whole match without a group.

    Raises:
        UserError: The pattern is invalid, or does not match some name.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--label-from {pattern!r}: not a regular expression ({error})") from error
    found = [regex.search(PurePosixPath(name).name) for name in names]
    labels = [(m.group(1) if regex.groups else m.group(0)) if m else None for m in found]
    unmatched = [name for name, label in zip(names, labels, strict=True) if not label]
    if unmatched:
        files = f"{len(unmatched)} file names: {first_few(unmatched)}"
        raise UserError(f"--label-from {pattern!r} finds nothing in {files}")
    return [label for label in labels if label]


def metadata_labels(names: Sequence[str], rows: dict[str, Row], notes: list[str]) -> list[object] | None:
    """The metadata column `label` of each file, blank where a row has none; None if all are blank."""
    labels = [rows[name].get("label") for name in names]
    missing = [name for name, label in zip(names, labels, strict=True) if is_blank(label)]
    if len(missing) == len(names):
        return None
    if missing:
        notes.append(f"{len(missing)} of {len(names)} images have no label in the metadata: {first_few(missing)}")
    return labels


def is_blank(label: object) -> bool:
    """Whether a label is missing: None, an empty text or NaN."""
    return label is None or label == "" or label != label


def encode_labels(labels: Sequence[object]) -> tuple[NDArray[np.int64], list[str]]:
    """Class numbers (N,) and class names; blank labels are `UNKNOWN`.

    Classes are sorted: by value if all names are integers, else as text.
    """
    blank = [is_blank(label) for label in labels]
    texts = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in labels]
    names = sorted({text for text, empty in zip(texts, blank, strict=True) if not empty})
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=lambda name: (int(name), name))
    number = {name: k for k, name in enumerate(names)}
    numbers = [UNKNOWN if empty else number[text] for text, empty in zip(texts, blank, strict=True)]
    return np.array(numbers, np.int64), names


def renumber_labels(labels: NDArray[np.int64], numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (N,) with class k replaced by numbers[k]; `UNKNOWN` stays."""
    return np.append(np.asarray(numbers, np.int64), UNKNOWN)[labels]  # UNKNOWN is -1, the index of the last


def read_captions(
    names: Sequence[str], rows: dict[str, Row] | None, files: Files, notes: list[str]
) -> list[str] | None:
    """Caption of each file, from the metadata or from a .txt file of the same name; None without any caption."""
    key = next((k for k in TEXT_KEYS if any(rows[name].get(k) for name in names)), None) if rows else None
    if rows and key:
        captions = [str(rows[name].get(key) or "") for name in names]
    else:
        present = set(files.names)
        text_files = [str(PurePosixPath(name).with_suffix(".txt")) for name in names]
        offsets = files.offsets or {}
        ordered = sorted(present & set(text_files), key=lambda name: offsets.get(name, 0))
        texts = {name: files.text(name).strip() for name in ordered}
        captions = [texts.get(name, "") for name in text_files]
    missing = sum(not caption for caption in captions)
    if missing == len(names):
        return None
    if missing:
        notes.append(f"{missing} of {len(names)} images have no caption; an empty text is used")
    return captions
