"""Conditions of files: values from folders, metadata or file names; captions from metadata or text files."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sfumato.data.conditions import CAPTION, LABEL, Known, Labels, Numbers, Texts, is_blank, look_numeric, parse_number
from sfumato.data.files import Files, first_few
from sfumato.errors import UserError
from sfumato.registry import nearest
from sfumato.types import UNKNOWN

Row = dict[str, object]
METADATA = ("metadata.jsonl", "metadata.csv")  # file names, lower case
HELD_OUT_FOLDERS = ("test", "validation", "val", "valid")  # folders or splits beside train; the first present is used
TEXT_KEYS = ("text", "prompt", "caption")  # metadata columns of the caption; the first present is used
UNLABELLED = ("unlabelled", "unlabeled")  # folders of files without a label


@dataclass(frozen=True)
class ConditionOptions:
    """Where the conditions of items are found, and which are numbers.

    Args:
        label_from: Regular expression for file names: its named groups are conditions, or its first group is `label`.
        label_column: Columns of the metadata that are conditions, in this order; empty for `label` alone.
        numeric: Conditions that are numbers although they look like classes.
        categorical: Conditions that are classes although they look like numbers.

    Raises:
        UserError: The pattern is invalid; or a name cannot be used, is used twice, or is not that of a condition.
    """

    label_from: str | None = None
    label_column: Sequence[str] = ()
    numeric: Sequence[str] = ()
    categorical: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if self.names.count(name) > 1:
                raise UserError(f"the condition {name!r} is named twice in --label-from and --label-column")
            if "=" in name:
                raise UserError(f"--label-column {name!r}: the name of a condition cannot have '='; rename the column")
            if name == CAPTION:
                raise UserError(f"{name!r} is the name of the captions, and cannot be that of another condition")
        for name in (*self.numeric, *self.categorical) if self.names else ():
            if name not in (*self.names, LABEL):
                raise UserError(f"--numeric, --categorical: no condition {name!r}; {nearest(name, self.names)}")
        both = [name for name in self.numeric if name in self.categorical]
        if both:
            raise UserError(f"{both[0]!r} cannot be both categorical and numeric")

    @property
    def names(self) -> tuple[str, ...]:
        """The conditions that the user asks for by name or pattern; empty by default."""
        return (*(group_names(self.label_from) if self.label_from else ()), *self.label_column)

    def condition(self, name: str, values: Sequence[object], origins: Sequence[str], source: object) -> Known:
        """The condition that a column of values (N,) holds; blank ones are unknown.

        They are numbers if the user says so, or if they are in a column of metadata and look like numbers; the column
        `label` holds classes unless the user says otherwise.

        Args:
            name: Name of the condition.
            values: Texts or numbers.
            origins: Where each value is from, for errors.
            source: Where they all are from, for errors.

        Raises:
            UserError: No value is known; or a text is among numbers.
        """
        if name in self.names and all(map(is_blank, values)):
            raise UserError(f"{source}: {name} has no values", code=1)
        inferred = name in self.label_column and name != LABEL and name not in self.categorical
        if name in self.numeric or (inferred and look_numeric(values)):
            return _numbers(name, values, origins, source)
        return Labels.from_values(values)

    def like(self, conditions: Mapping[str, Known]) -> "ConditionOptions":
        """The same options with the kinds of given conditions, those of the training part for a held-out part."""
        numeric = [name for name, known in conditions.items() if isinstance(known, Numbers)]
        categorical = [name for name, known in conditions.items() if isinstance(known, Labels)]
        return ConditionOptions(self.label_from, self.label_column, numeric, categorical)


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


def _numbers(name: str, values: Sequence[object], origins: Sequence[str], source: object) -> Numbers:
    numbers = np.full(len(values), np.nan, np.float32)
    for i, value in enumerate(values):
        number = parse_number(value)
        if number is None:
            remedy = "correct it or leave it blank"
            raise UserError(f"{source}: {name} of {origins[i]} is {value!r}, not a number; {remedy}", code=1)
        numbers[i] = number
    return Numbers(numbers)


def group_names(pattern: str) -> list[str]:
    """Conditions that a regular expression finds in file names: its named groups, or `label` if its first has no name.

    Raises:
        UserError: The pattern is invalid.
    """
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise UserError(f"--label-from {pattern!r}: not a regular expression ({error})") from error
    return list(groups) if 1 in groups.values() else [LABEL]


def values_from_names(names: Sequence[str], pattern: str, notes: list[str]) -> dict[str, Sequence[object]]:
    """Values (N,) of each condition that a regular expression finds in file names; see `group_names`.

    A condition `label` alone is the first group, or the whole match without a group. Some of several named groups may
    find nothing in a name.

    Raises:
        UserError: The pattern is invalid, or finds nothing at all in some name.
    """
    conditions, regex = group_names(pattern), re.compile(pattern)
    groups = [1 if regex.groups else 0] if conditions == [LABEL] else conditions
    matches = [regex.search(PurePosixPath(name).name) for name in names]
    values: dict[str, Sequence[object]] = {
        condition: [match[group] if match else None for match in matches]
        for condition, group in zip(conditions, groups, strict=True)
    }
    unmatched = [name for name, *found in zip(names, *values.values(), strict=True) if not any(found)]
    if unmatched:
        files = f"{len(unmatched)} file names: {first_few(unmatched)}"
        raise UserError(f"--label-from {pattern!r} finds nothing in {files}")
    for key, column in values.items():
        _note_missing(key, names, column, notes)
    return values


def metadata_values(
    names: Sequence[str], rows: Mapping[str, Row] | None, columns: Sequence[str], files: Files, notes: list[str]
) -> dict[str, Sequence[object]]:
    """Values (N,) of each file in columns of the metadata, blank where a row has none.

    Raises:
        UserError: There is no metadata, or it lacks a column.
    """
    if rows is None:
        raise UserError(f"{files.root}: --label-column needs {' or '.join(METADATA)}, and there is none")
    present = dict.fromkeys(key for row in rows.values() for key in row)
    values: dict[str, Sequence[object]] = {}
    for column in columns:
        check_column(column, [key for key in present if key and key != "file_name"], files.root)
        values[column] = [rows[name].get(column) for name in names]
        _note_missing(column, names, values[column], notes)
    return values


def check_column(name: str, columns: Iterable[str], source: object) -> None:
    """Refuse a column that a source does not have."""
    columns = list(columns)
    if name not in columns:
        raise UserError(f"{source}: --label-column: no column {name!r}; {nearest(name, columns)}")


def _note_missing(condition: str, names: Sequence[str], values: Sequence[object], notes: list[str]) -> None:
    missing = [name for name, value in zip(names, values, strict=True) if is_blank(value)]
    if 0 < len(missing) < len(names):
        notes.append(f"{len(missing)} of {len(names)} images have no {condition}: {first_few(missing)}")


def _default_labels(
    names: Sequence[str], rows: Mapping[str, Row] | None, split: bool, notes: list[str]
) -> Sequence[object] | None:
    """The metadata column `label` of each file, else its folder (see `folder_labels`); None without any label."""
    labels = [rows[name].get(LABEL) for name in names] if rows is not None else []
    if all(map(is_blank, labels)):
        return folder_labels(names, split, notes)
    _note_missing(LABEL, names, labels, notes)
    return labels


def read_conditions(
    names: Sequence[str],
    rows: Mapping[str, Row] | None,
    split: bool,
    files: Files,
    options: ConditionOptions,
    notes: list[str],
) -> dict[str, Known]:
    """All conditions of files: those that the options name, or a label without any; and captions.

    Args:
        names: Names of the N files.
        rows: Their metadata.
        split: Whether the files lie in train/ and test/.
        files: The folder or archive.
        options: Where the conditions are found.
        notes: Gets messages to the user.

    Raises:
        UserError: A condition cannot be read.
    """
    values: dict[str, Sequence[object]] = {}
    if options.label_from:
        values |= values_from_names(names, options.label_from, notes)
    if options.label_column:
        values |= metadata_values(names, rows, options.label_column, files, notes)
    labels = None if options.names else _default_labels(names, rows, split, notes)
    values |= {} if labels is None else {LABEL: labels}
    conditions = {name: options.condition(name, column, names, files.root) for name, column in values.items()}
    captions = read_captions(names, rows, files, notes)
    return conditions if captions is None else {**conditions, CAPTION: Texts(captions)}


def renumber_labels(labels: NDArray[np.int64], numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (N,) with class k replaced by numbers[k]; `UNKNOWN` stays."""
    return np.append(np.asarray(numbers, np.int64), UNKNOWN)[labels]  # UNKNOWN is -1, the index of the last


def read_captions(
    names: Sequence[str], rows: Mapping[str, Row] | None, files: Files, notes: list[str]
) -> list[str | None] | None:
    """Caption of each file, from the metadata or from a .txt file of the same name, None where it is blank.

    The result is None without any caption.
    """
    key = next((k for k in TEXT_KEYS if any(rows[name].get(k) for name in names)), None) if rows else None
    if rows and key:
        captions = [str(rows[name].get(key) or "") or None for name in names]
    else:
        present = set(files.names)
        text_files = [str(PurePosixPath(name).with_suffix(".txt")) for name in names]
        offsets = files.offsets or {}
        ordered = sorted(present & set(text_files), key=lambda name: offsets.get(name, 0))
        texts = {name: files.text(name).strip() for name in ordered}
        captions = [texts.get(name) or None for name in text_files]
    _note_missing("caption", names, captions, notes)
    return captions if any(captions) else None
