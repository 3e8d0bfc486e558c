"""Reads a table file or folder into training and held-out `TableDataset`s."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sfumato.data.cache import allocate
from sfumato.data.dataset import split
from sfumato.data.files import first_few, inventory
from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.columns import (
    Column,
    Values,
    find_name,
    find_spikes,
    missing_markers,
    missing_mask,
    modelled,
    parse_cells,
)
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.formats import DELIMITERS, TABLE_SUFFIX, TableFile, check_readable, open_table
from sfumato.modalities.table.infer import ColumnInference, KindOverride
from sfumato.registry import nearest

if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = LazyModule("pyarrow")

MIN_TABLE_ROWS = 20  # fewest rows that a model can be trained on
HELD_OUT_FILES = ("test", "validation", "val")  # names of the held-out file beside train.csv, without suffix


def is_table(source: str | Path) -> bool:
    """Whether a source looks like a table: by its file name, or a folder with train.csv (.tsv, .parquet ...)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return any(
            TABLE_SUFFIX.sub("", file.name).lower() == "train"
            for file in path.iterdir()
            if TABLE_SUFFIX.search(file.name)
        )
    return bool(TABLE_SUFFIX.search(path.name))


def read_table(
    source: str | Path,
    *,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    exclude: Sequence[str] = (),
    held_out: float = 0.1,
) -> tuple[TableDataset, TableDataset]:
    """Training and held-out rows of a table; the columns are inferred from both (see `ColumnInference`).

    Args:
        source: A .csv, .tsv (also .gz) or .parquet with a header; or a folder with train.csv and, held out, test.csv.
        categorical: Columns that are categories although they look like numbers.
        numeric: Columns that are numbers although they look like categories or ids.
        exclude: Columns to leave out.
        held_out: Held-out fraction if there is no test.csv, at most 5,000 rows (see `split`).

    Raises:
        UserError: The source is not a valid table; the message says why and what to do.
    """
    path = Path(source).expanduser()
    files = _same_header([open_table(file) for file in table_files(path)])
    names = files[0].names
    overrides: dict[str, KindOverride] = dict.fromkeys(
        _resolve_names(f"{source}: categorical", categorical, names), "category"
    )
    for name in _resolve_names(f"{source}: numeric", numeric, names):
        if name in overrides:
            raise UserError(f"{source}: column {name!r} cannot be both categorical and numeric")
        overrides[name] = "number"
    excluded = _resolve_names(f"{source}: exclude", exclude, names)
    for file in files:
        check_readable(file, set(file.names) - excluded)
    notes = _dialect_notes(files[0])
    columns, counts = _infer(files, overrides, excluded, notes)
    data = TableDataset(allocate((sum(counts), len(modelled(columns))), np.float64), columns, files[0].dialect)
    start = 0
    for file, count in zip(files, counts, strict=True):
        _parse_file(data.store[start : start + count], columns, file, notes)
        start += count
    data.notes = notes
    if len(counts) == 1:
        data.file_hash = _sha256(files[0].path)
        return _with_statistics(*split(data, held_out))
    return _with_statistics(data.subset(np.arange(counts[0])), data.subset(np.arange(counts[0], start)))


def read_rows(path: str | Path, columns: Sequence[Column]) -> TableDataset:
    """The rows of one file with given columns, such as samples of a model. Ids and constants may be absent.

    Args:
        path: A .csv, .tsv or .parquet with a header.
        columns: Columns of the table; unknown categories are read as missing, with a note.

    Raises:
        UserError: The file is not a table, lacks a column, or has text in a column of numbers.
    """
    file = open_table(Path(path).expanduser())
    check_readable(file, {column.name for column in modelled(columns)})
    absent = [column.name for column in modelled(columns) if column.name not in file.names]
    if absent:
        raise UserError(f"{path}: lacks the column{'s' * (len(absent) > 1)} {first_few(map(repr, absent))}", code=1)
    notes = _dialect_notes(file)
    extra = sorted(set(file.names) - {column.name for column in columns})
    if extra:
        notes.append(f"{path}: not in the model, ignored: {first_few(map(repr, extra))}")
    count = sum(len(chunk[0]) for chunk in file.chunks())
    if not count:
        raise UserError(f"{path}: has no rows", code=1)
    store = allocate((count, len(modelled(columns))), np.float64)
    data = TableDataset(store, list(columns), file.dialect, notes=notes, file_hash=_sha256(file.path))
    _parse_file(data.store, data.columns, file, notes)
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _resolve_names(option: str, requested: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names of the header that an option requests."""
    resolved = set[str]()
    for name in requested:
        found = find_name(name, names)
        if found is None:
            raise UserError(f"{option}: no column {name!r}; {nearest(name, names)}")
        resolved.add(found)
    return resolved


def table_files(path: Path) -> list[Path]:
    """The training file, and the held-out one if there is one."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        if not TABLE_SUFFIX.search(path.name):
            raise UserError(f"{path}: not a table; expected .csv, .tsv or .parquet")
        return [path]
    tables = {
        TABLE_SUFFIX.sub("", file.name).lower(): file
        for file in sorted(path.iterdir())
        if TABLE_SUFFIX.search(file.name)
    }
    if "train" not in tables:
        found = inventory(file.name for file in path.iterdir())
        raise UserError(f"{path}: no train.csv (or .tsv, .parquet) here, found {found}; name a single file", code=1)
    held = next((tables[name] for name in HELD_OUT_FILES if name in tables), None)
    return [tables["train"], held] if held else [tables["train"]]


def _same_header(files: list[TableFile]) -> list[TableFile]:
    names = files[0].names
    for file in files[1:]:
        differing = sorted(set(names) ^ set(file.names))
        if differing:
            problem = f"{file.path}: has other columns than {files[0].path.name}"
            raise UserError(f"{problem}: {first_few(map(repr, differing))}; both need the same header", code=1)
    return files


def _dialect_notes(file: TableFile) -> list[str]:
    delimiter = file.dialect.delimiter
    notes = [f"{file.path}: the delimiter is {DELIMITERS[delimiter]}"] if delimiter != "," else []
    return [*notes, f"{file.path}: the decimal mark is a comma"] if file.dialect.decimal == "," else notes


def _infer(
    files: list[TableFile], overrides: Mapping[str, KindOverride], exclude: set[str], notes: list[str]
) -> tuple[list[Column], list[int]]:
    """The inferred columns, and the number of rows of each file."""
    first = files[0]
    inferences = {
        name: ColumnInference(name, first.path, dtype, first.dialect.decimal)
        for name, dtype in zip(first.names, first.dtypes, strict=True)
        if name not in exclude
    }
    counts: list[int] = []
    for file in files:
        counts.append(0)
        for chunk in file.chunks():
            counts[-1] += len(chunk[0])
            for name, cells in zip(file.names, chunk, strict=True):
                if name in inferences:
                    inferences[name].add(cells)
        for inference in inferences.values():
            inference.end_file()
    if counts[0] < MIN_TABLE_ROWS or not all(counts):
        i = next((i for i, count in enumerate(counts) if not count), 0)
        required = "one row is" if i else f"{MIN_TABLE_ROWS} rows are"
        raise UserError(f"{files[i].path}: has {counts[i]} rows; at least {required} needed", code=1)
    columns = [inference.column(overrides.get(name), notes) for name, inference in inferences.items()]
    _note_unmodelled(columns, first.path, notes)
    markers = [f"{column.missing!r} in {column.name!r}" for column in columns if column.missing]
    if markers:
        notes.append(f"{first.path}: read as missing: {first_few(markers)}")
    return columns, counts


def _note_unmodelled(columns: list[Column], path: Path, notes: list[str]) -> None:
    """Note the ids and constants; raise if there are no other columns."""
    ids = [repr(column.name) for column in columns if column.kind == "id"]
    constants = [repr(column.name) for column in columns if column.kind == "constant"]
    if len(ids) + len(constants) == len(columns):
        found = f"{len(constants)} constant, {len(ids)} ids"
        raise UserError(f"{path}: no column can be modelled ({found}); add one that varies", code=1)
    if ids:
        notes.append(f"{path}: unique in every row (ids), new ones are numbered: {first_few(ids)}")
    if constants:
        notes.append(f"{path}: constant: {first_few(constants)}")


def _parse_file(store: Values, columns: list[Column], file: TableFile, notes: list[str]) -> None:
    """Parse the rows of a file into its part of the store (n, D)."""
    start = 0
    unknown: dict[str, int] = {}
    for chunk in file.chunks():
        cells = dict(zip(file.names, chunk, strict=True))
        for k, column in enumerate(modelled(columns)):
            try:
                values = parse_cells(column, cells[column.name], file.dialect.decimal)
            except pa.ArrowInvalid as error:
                reason = str(error).splitlines()[0]
                message = f"{file.path}: column {column.name!r} should hold numbers ({reason})"
                raise UserError(message, code=1) from error
            store[start : start + len(values), k] = values
            present = ~missing_mask(cells[column.name], missing_markers(column.kind)).to_numpy(zero_copy_only=False)
            unknown[column.name] = unknown.get(column.name, 0) + int((np.isnan(values) & present).sum())
        start += len(chunk[0])
    affected = [f"{name!r} ({count})" for name, count in unknown.items() if count > 0]
    if affected:
        notes.append(f"{file.path}: values unknown to the model, read as missing: {first_few(affected)}")


def _with_statistics(train: TableDataset, held: TableDataset) -> tuple[TableDataset, TableDataset]:
    """Both parts, with the range and the spikes of each number or date in the training part."""
    columns, k = list(train.columns), 0
    for i, column in enumerate(train.columns):
        if column.modelled and not column.levels:
            values = train.store[:, k] if train.rows is None else train.store[train.rows, k]
            present = values[~np.isnan(values)]
            if present.size:
                spikes, other = find_spikes(present)
                low, high = float(present.min()), float(present.max())
                columns[i] = replace(column, low=low, high=high, spikes=spikes, other=other)
        k += column.modelled
    train.columns = held.columns = columns
    return train, held
