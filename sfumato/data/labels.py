"""What is known of each image: class from folder, metadata or file name; caption from metadata or a text file."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..types import UNKNOWN
from .files import Files, first_few

Row = dict[str, object]
METADATA = ("metadata.jsonl", "metadata.csv")
HELD = ("test", "validation", "val", "valid")
TEXT_KEYS = ("text", "prompt", "caption")
UNLABELLED = ("unlabelled", "unlabeled")  # folder of images whose class is not known


def _rows_of(name: str, text: str, where: str) -> list[Row]:
    if name.endswith(".csv"):
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, line {number}: not JSON ({error.msg})", code=1) from error
        if not isinstance(row, dict):
            raise UserError(f'{where}, line {number}: want one object a line, as {{"file_name": "a.png"}}', code=1)
        rows.append(row)
    return rows


def read_metadata(files: Files) -> dict[str, Row] | None:
    """Rows by name of the file they speak of (relative to the root), or None where there is no metadata file."""
    found = [name for name in files.names if PurePosixPath(name).name.lower() in METADATA]
    odd = [name for name in files.names if PurePosixPath(name).stem.lower() == "metadata" and name not in found]
    if odd and not found:
        raise UserError(f"{files.root}: found {odd[0]}, but only {' or '.join(METADATA)} is read: rename it", code=1)
    rows: dict[str, Row] = {}
    for name in found:
        for number, row in enumerate(_rows_of(name.lower(), files.text(name), f"{files.root}/{name}"), 1):
            file_name = row.get("file_name")
            if not isinstance(file_name, str) or not file_name:
                raise UserError(f"{files.root}/{name}, row {number}: has no file_name", code=1)
            rows[str(PurePosixPath(name).parent / file_name.replace("\\", "/"))] = row
    return rows if found else None


def match(images: Sequence[str], rows: dict[str, Row], files: Files, skip_bad: bool, notes: list[str]) -> list[str]:
    """The images that have a row; rows without image and images without row raise, or are left out by `skip_bad`."""
    present = set(files.names)
    lost = [name for name in rows if name not in present]
    extra = [name for name in images if name not in rows]
    faults = ((lost, "rows of the metadata name a missing file"), (extra, "images are not in the metadata"))
    for names, fault in faults:
        line = f"{files.root}: {len(names)} {fault}: {first_few(names)}"
        if names and not skip_bad:
            raise UserError(f"{line}; mend the metadata, or leave them out with --skip-bad", code=1)
        if names:
            notes.append(f"{line}; left out")
    return [name for name in images if name in rows]


def split_parts(images: Sequence[str], notes: list[str]) -> tuple[list[str], list[str]]:
    """Names under train/ and under test/ (or validation/, val/); all and none where there are no such folders."""
    top = [name.split("/", 1)[0] if "/" in name else "" for name in images]
    held = next((part for part in HELD if part in top), None)
    if "train" not in top or held is None:
        return list(images), []
    for part, count in Counter(top).items():
        if part not in ("train", held):
            notes.append(f"{part or 'the root'}: {count} images not used (train/ is learned, {held}/ held out)")
    return [n for n, t in zip(images, top, strict=True) if t == "train"], [
        n for n, t in zip(images, top, strict=True) if t == held
    ]


def folder_labels(images: Sequence[str], parted: bool, notes: list[str]) -> list[str | None] | None:
    """Class of each image: its first folder below the ones that all share, and below train/ and test/ if `parted`.

    None for those in a folder called unlabelled/.
    """
    folders = [PurePosixPath(name).parent.parts[1 if parted else 0 :] for name in images]
    shared = 0
    while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    labels = [parts[shared] if len(parts) > shared else "" for parts in folders]
    if not any(labels):
        return None
    if not all(labels):
        notes.append(f"{labels.count('')} images lie in no class folder: the folders are not taken as classes")
        return None
    return [None if label.lower() in UNLABELLED else label for label in labels]


def labels_from_names(images: Sequence[str], pattern: str) -> list[str]:
    """What the first group of the regular expression finds in each file name."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--label-from {pattern!r}: not a regular expression ({error})") from error
    found = [regex.search(PurePosixPath(name).name) for name in images]
    labels = [(m.group(1) if regex.groups else m.group(0)) if m else None for m in found]
    missed = [name for name, label in zip(images, labels, strict=True) if not label]
    if missed:
        raise UserError(f"--label-from {pattern!r} finds nothing in {len(missed)} file names: {first_few(missed)}")
    return [label for label in labels if label]


def metadata_labels(images: Sequence[str], rows: dict[str, Row], notes: list[str]) -> list[object] | None:
    """The column `label`, None where a row leaves it open; None where no row has one."""
    labels = [rows[name].get("label") for name in images]
    missing = [name for name, label in zip(images, labels, strict=True) if is_blank(label)]
    if len(missing) == len(images):
        return None
    if missing:
        notes.append(f"{len(missing)} of {len(images)} images have no label in the metadata: {first_few(missing)}")
    return labels


def is_blank(label: object) -> bool:
    """Whether a label is left open: none, an empty text, or not a number."""
    return label is None or label == "" or label != label


def encode_labels(labels: Sequence[object]) -> tuple[NDArray[np.int64], list[str]]:
    """Class numbers (N,) and names: whole numbers in their order, anything else in the order of its text.

    Labels that are left open are `UNKNOWN`.
    """
    blank = [is_blank(label) for label in labels]
    texts = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in labels]
    names = sorted({text for text, empty in zip(texts, blank, strict=True) if not empty})
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=lambda name: (int(name), name))
    number = {name: k for k, name in enumerate(names)}
    numbers = [UNKNOWN if empty else number[text] for text, empty in zip(texts, blank, strict=True)]
    return np.array(numbers, np.int64), names


def renumbered(labels: NDArray[np.int64], numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (N,) whose class k is called numbers[k] now; unknown ones stay so."""
    return np.append(np.asarray(numbers, np.int64), UNKNOWN)[labels]  # UNKNOWN, as an index, is the last


def read_captions(
    images: Sequence[str], rows: dict[str, Row] | None, files: Files, notes: list[str]
) -> list[str] | None:
    """Text of each image, from the metadata or from a .txt beside it; None where there is none at all."""
    key = next((k for k in TEXT_KEYS if any(rows[name].get(k) for name in images)), None) if rows else None
    if rows and key:
        captions = [str(rows[name].get(key) or "") for name in images]
    else:
        present = set(files.names)
        beside = [str(PurePosixPath(name).with_suffix(".txt")) for name in images]
        place = files.place or {}
        texts = {
            name: files.text(name).strip() for name in sorted(present & set(beside), key=lambda n: place.get(n, 0))
        }
        captions = [texts.get(name, "") for name in beside]
    missing = sum(not caption for caption in captions)
    if missing == len(images):
        return None
    if missing:
        notes.append(f"{missing} of {len(images)} images have no caption: theirs is empty")
    return captions
