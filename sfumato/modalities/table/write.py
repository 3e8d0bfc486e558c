"""Writes values of a table as CSV, TSV or Parquet, with the columns, types and order of the source."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from sfumato.data.output import check_file_target, draft_file
from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.columns import Column, Values, format_cells, missing_cells, modelled, to_series
from sfumato.modalities.table.formats import TABLE_SUFFIX, Dialect, arrow_type, is_string_type

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet
else:
    pa, parquet, pd = LazyModule("pyarrow"), LazyModule("pyarrow.parquet"), LazyModule("pandas")

WRITE_ROWS = 2**16  # text rows that are formatted at a time


def column_frame(columns: Sequence[Column], values: Values) -> pd.DataFrame:
    """A data frame with all columns of the source, in their order and types.

    Ids are renumbered, constants filled in; missing cells are pandas' NaN, NaT or <NA>.

    Args:
        columns: All columns.
        values: Values (N, D) of the modelled columns, NaN if missing; numbers are rounded, levels clipped.
    """
    return pd.concat({c.name: to_series(c, v) for c, v in column_cells(columns, values)}, axis=1)


def column_cells(columns: Sequence[Column], values: Values) -> list[tuple[Column, Values]]:
    """Each column with its values (N,); NaN for columns that are not modelled."""
    assert values.ndim == 2 and values.shape[1] == len(modelled(columns)), values.shape
    modelled_values = iter(values.T)
    empty = np.full(len(values), np.nan)
    return [(column, next(modelled_values) if column.modelled else empty) for column in columns]


def check_table_output(path: Path, overwrite: bool) -> None:
    """Raise if no table may be written to this path."""
    if not TABLE_SUFFIX.search(path.name):
        raise UserError(f"{path}: not the name of a table; expected .csv, .tsv or .parquet")
    check_file_target(path, overwrite)


def write_table(
    path: str | Path,
    columns: Sequence[Column],
    values: Values,
    *,
    dialect: Dialect | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a table atomically; `read_table` and `read_rows` read it back.

    Args:
        path: A .csv, .tsv (also .gz) or .parquet.
        columns: All columns of the source.
        values: Values (N, D) of the modelled columns, NaN if missing.
        dialect: Dialect of a text file; default commas. A .tsv always has tabs, a .csv never.
        overwrite: Whether to replace an existing file.

    Raises:
        UserError: The file exists or cannot be written, or a value is infinite.
    """
    path = Path(path)
    check_table_output(path, overwrite)
    if np.isinf(values).any():
        raise UserError(f"{path}: the table has infinite numbers; nothing written", code=1)
    dialect = dialect or Dialect()
    if path.name.lower().removesuffix(".gz").endswith(".tsv"):
        dialect = replace(dialect, delimiter="\t")
    elif dialect.delimiter == "\t":
        dialect = Dialect(";" if dialect.decimal == "," else ",", dialect.decimal)
    with draft_file(path) as draft:
        if is_parquet(path):
            _write_parquet(draft, columns, values)
        else:
            with text_writer(draft, path) as text:
                _write_lines(text, columns, values, dialect)
    return path


def is_parquet(path: Path) -> bool:
    """Whether a file of this name is Parquet rather than text."""
    return path.suffix.lower() in (".parquet", ".pq")


@contextmanager
def text_writer(draft: Path, path: Path) -> Iterator[TextIO]:
    """Open the draft of a text file; compressed if the final name `path` ends in .gz."""
    with draft.open("wb") as raw:
        compressed = path.suffix.lower() == ".gz"
        file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if compressed else raw
        with TextIOWrapper(file, "utf-8", newline="") as text:  # type: ignore[arg-type]
            yield text


def _write_lines(text: TextIO, columns: Sequence[Column], values: Values, dialect: Dialect) -> None:
    writer = csv.writer(text, delimiter=dialect.delimiter, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    for start in range(0, len(values), WRITE_ROWS):
        pairs = column_cells(columns, values[start : start + WRITE_ROWS])
        writer.writerows(zip(*(format_cells(column, v, dialect.decimal, start) for column, v in pairs), strict=True))


def _write_parquet(draft: Path, columns: Sequence[Column], values: Values) -> None:
    arrays = [arrow_cells(c, v, arrow_type(c.dtype) if c.dtype else None) for c, v in column_cells(columns, values)]
    parquet.write_table(pa.Table.from_arrays(arrays, [column.name for column in columns]), draft)


def arrow_cells(column: Column, values: Values, kind: pa.DataType | None) -> pa.Array:
    """Cells as an Arrow array of this type; None for the column's natural type."""
    if kind is None:
        return pa.Array.from_pandas(to_series(column, values))
    if pa.types.is_null(kind):
        return pa.nulls(len(values))
    if pa.types.is_dictionary(kind):
        return arrow_cells(column, values, kind.value_type).dictionary_encode().cast(kind)
    if is_string_type(kind):
        return pa.array(format_cells(column, values), pa.string(), mask=missing_cells(column, values)).cast(kind)
    cells = pa.Array.from_pandas(to_series(column, values))
    if pa.types.is_decimal(kind) and pa.types.is_integer(cells.type):
        cells = cells.cast(pa.float64())  # int64 casts only to decimals of 19 digits or more
    return cells.cast(kind)
