"""Copies of table files with imputed values in their missing cells; every other cell stays as it is."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.data.output import draft_file
from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.columns import (
    Column,
    Values,
    format_cells,
    missing_markers,
    missing_mask,
    modelled,
    parse_cells,
)
from sfumato.modalities.table.formats import Dialect, TableFile, open_table, to_text_or_float
from sfumato.modalities.table.numbers import pc
from sfumato.modalities.table.write import arrow_cells, check_table_output, is_parquet, text_writer

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet
else:
    pa, parquet = LazyModule("pyarrow"), LazyModule("pyarrow.parquet")


def write_imputed(
    out: Path, sources: Sequence[Path], columns: Sequence[Column], values: Values, overwrite: bool
) -> None:
    """Write the rows of some files, one file after the other, with a value in each missing cell.

    All other cells keep their text (in Parquet their value), also in columns that are not in the model.

    Args:
        out: A table of the same type as the sources: text, or Parquet.
        sources: Files with the same header.
        columns: Columns of the model.
        values: Values (N, D) of the modelled columns for all rows of all files; only those of missing cells are used.
        overwrite: Whether to replace an existing file.

    Raises:
        UserError: The file exists, cannot be written, or is of another type.
    """
    check_imputed_output(out, sources, overwrite)
    files = [open_table(path) for path in sources]
    imputed = {column.name: (column, values[:, k]) for k, column in enumerate(modelled(columns))}
    with draft_file(out) as draft:
        if is_parquet(out):
            parquet.write_table(_impute_parquet(sources, imputed), draft)
            return
        dialect, names = files[0].dialect, files[0].names
        with text_writer(draft, out) as text:
            writer = csv.writer(text, delimiter=dialect.delimiter, lineterminator="\n")
            writer.writerow(names)
            start = 0
            for chunk in _chunks(files):
                writer.writerows(_impute_rows(chunk, names, imputed, start, dialect))
                start += len(chunk[0])


def check_imputed_output(out: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raise if the imputed table cannot be written to this path."""
    check_table_output(out, overwrite)
    if any(is_parquet(path) != is_parquet(out) for path in sources):
        raise UserError(f"{out}: the output has the file type of its source: name it like {sources[0].name}")


def _chunks(files: Sequence[TableFile]) -> Iterator[list[pa.Array]]:
    """The rows of all files, in the column order of the first one."""
    for file in files:
        order = [file.names.index(name) for name in files[0].names]
        for chunk in file.chunks():
            yield [chunk[k] for k in order]


def _impute_rows(
    chunk: Sequence[pa.Array],
    names: Sequence[str],
    imputed: dict[str, tuple[Column, Values]],
    start: int,
    dialect: Dialect,
) -> Iterator[tuple[str, ...]]:
    """The rows of a chunk that begins with row `start`."""
    columns: list[list[str]] = []
    for name, cells in zip(names, chunk, strict=True):
        texts = cells.to_pylist()
        if name in imputed:
            column, values = imputed[name]
            missing = np.flatnonzero(_missing(column, cells, dialect.decimal))
            for i, text in zip(missing, format_cells(column, values[start + missing], dialect.decimal), strict=True):
                texts[i] = text
        columns.append(texts)
    return zip(*columns, strict=True)


def _missing(column: Column, cells: pa.Array, decimal: str = ".") -> Any:
    """Which cells (N,) are missing; unknown levels are not."""
    marked = missing_mask(cells, missing_markers(column.kind)).to_numpy(zero_copy_only=False)
    return np.isnan(parse_cells(column, cells, decimal)) & marked


def _impute_parquet(sources: Sequence[Path], imputed: dict[str, tuple[Column, Values]]) -> pa.Table:
    """The rows of all files, each column in its own type."""
    tables = [parquet.read_table(path) for path in sources]
    names = tables[0].column_names
    # a column without missing cells in one file may have integers there, and floats in another
    table = pa.concat_tables([table.select(names) for table in tables], promote_options="permissive")
    for k, name in enumerate(table.column_names):
        if name in imputed:
            column, values = imputed[name]
            cells = table.column(k).combine_chunks()
            missing = pa.array(_missing(column, to_text_or_float(cells)))
            filled = arrow_cells(column, np.where(missing, values, np.nan), cells.type)
            table = table.set_column(k, table.field(k), pc.if_else(missing, filled, cells))
    return table
