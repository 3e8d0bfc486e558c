"""Values of a table back to a file: CSV, TSV or Parquet, with the columns, types and order of the original."""

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

from ..errors import UserError
from .columns import Column, Values, absent, modelled, series, texts
from .late import Late
from .rows import TABLE, Dialect, arrow_type, is_text
from .write import check_file_target, written

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet
else:
    pa, parquet, pd = Late("pyarrow"), Late("pyarrow.parquet"), Late("pandas")

PIECE = 2**16  # rows written at a time


def column_frame(columns: Sequence[Column], values: Values) -> pd.DataFrame:
    """A data frame with all columns of the source, in their order and types.

    Ids are numbered anew, constants filled in, missing cells are pandas' own (NaN, NaT, <NA>).

    Args:
        columns: All columns.
        values: The modelled ones (N, D), NaN where missing; numbers are put on their grid, levels are clipped.
    """
    return pd.concat({c.name: series(c, v) for c, v in paired(columns, values)}, axis=1)


def paired(columns: Sequence[Column], values: Values) -> list[tuple[Column, Values]]:
    """Each column with its values (N,); an empty column for those that are not modelled."""
    assert values.ndim == 2 and values.shape[1] == len(modelled(columns)), values.shape
    taken = iter(values.T)
    nothing = np.full(len(values), np.nan)
    return [(column, next(taken) if column.modelled else nothing) for column in columns]


def check_table_target(path: Path, overwrite: bool) -> None:
    """Raise when no table may be written there."""
    if not TABLE.search(path.name):
        raise UserError(f"{path}: not the name of a table; want .csv, .tsv or .parquet")
    check_file_target(path, overwrite)


def write_table(
    path: str | Path,
    columns: Sequence[Column],
    values: Values,
    *,
    dialect: Dialect | None = None,
    overwrite: bool = False,
) -> Path:
    """One table, whole or not at all; `read_table` and `read_rows` read it back.

    Args:
        path: A .csv, .tsv (also .gz) or .parquet.
        columns: All columns of the source.
        values: The modelled ones (N, D), NaN where missing.
        dialect: Of a text file; default commas. A .tsv has tabs in any case, and a .csv has none.
        overwrite: Whether a file may be replaced.

    Raises:
        UserError: The file is there already or cannot be written, or a value is infinite.
    """
    path = Path(path)
    check_table_target(path, overwrite)
    if np.isinf(values).any():
        raise UserError(f"{path}: the table holds infinite numbers: nothing written", code=1)
    dialect = dialect or Dialect()
    if path.name.lower().removesuffix(".gz").endswith(".tsv"):
        dialect = replace(dialect, delimiter="\t")
    elif dialect.delimiter == "\t":
        dialect = Dialect(";" if dialect.decimal == "," else ",", dialect.decimal)
    with written(path) as draft:
        if is_parquet(path):
            _write_parquet(draft, columns, values)
        else:
            with text_writer(draft, path) as text:
                _write_lines(text, columns, values, dialect)
    return path


def is_parquet(path: Path) -> bool:
    """Whether a file called so holds Parquet, and not text."""
    return path.suffix.lower() in (".parquet", ".pq")


@contextmanager
def text_writer(draft: Path, path: Path) -> Iterator[TextIO]:
    """The draft of a text file, packed if `path`, what it will be called, says so."""
    with draft.open("wb") as raw:
        packed = path.suffix.lower() == ".gz"
        file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        with TextIOWrapper(file, "utf-8", newline="") as text:  # type: ignore[arg-type]
            yield text


def _write_lines(text: TextIO, columns: Sequence[Column], values: Values, dialect: Dialect) -> None:
    writer = csv.writer(text, delimiter=dialect.delimiter, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    for start in range(0, len(values), PIECE):
        pairs = paired(columns, values[start : start + PIECE])
        writer.writerows(zip(*(texts(column, v, dialect.decimal, start) for column, v in pairs), strict=True))


def _write_parquet(draft: Path, columns: Sequence[Column], values: Values) -> None:
    arrays = [arrow_cells(c, v, arrow_type(c.dtype) if c.dtype else None) for c, v in paired(columns, values)]
    parquet.write_table(pa.Table.from_arrays(arrays, [column.name for column in columns]), draft)


def arrow_cells(column: Column, values: Values, kind: pa.DataType | None) -> pa.Array:
    """Cells in an Arrow type, that of the source say; None for the one that they are of by themselves."""
    if kind is None:
        return pa.Array.from_pandas(series(column, values))
    if pa.types.is_null(kind):
        return pa.nulls(len(values))
    if pa.types.is_dictionary(kind):
        return arrow_cells(column, values, kind.value_type).dictionary_encode().cast(kind)
    if is_text(kind):
        return pa.array(texts(column, values), pa.string(), mask=absent(column, values)).cast(kind)
    cells = pa.Array.from_pandas(series(column, values))
    if pa.types.is_decimal(kind) and pa.types.is_integer(cells.type):
        cells = cells.cast(pa.float64())  # an int64 goes into decimals of 19 digits or more only
    return cells.cast(kind)
