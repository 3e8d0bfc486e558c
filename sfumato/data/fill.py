"""Tables with their missing cells filled in; everything else as it stands in the file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .columns import Column, Values, blanks, encode, markers, modelled, pc, texts
from .late import Late
from .rows import Dialect, TableFile, open_table, plain
from .table_write import arrow_cells, check_table_target, is_parquet, text_writer
from .write import written

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet
else:
    pa, parquet = Late("pyarrow"), Late("pyarrow.parquet")


def fill_table(out: Path, sources: Sequence[Path], columns: Sequence[Column], values: Values, overwrite: bool) -> None:
    """Write the rows of some files, one after the other, with a value in each cell that is missing.

    Cells that are there keep their text (in Parquet their value), also in columns that no model knows.

    Args:
        out: A table of the same kind as the sources: text, or Parquet.
        sources: The files, of one header.
        columns: What the columns are.
        values: Of the modelled ones (N, D), for all rows of all files; those of cells that are there are not looked at.
        overwrite: Whether a file may be replaced.

    Raises:
        UserError: The file is there already, cannot be written, or is of another kind.
    """
    check_fill_target(out, sources, overwrite)
    files = [open_table(path) for path in sources]
    known = {column.name: (column, values[:, k]) for k, column in enumerate(modelled(columns))}
    with written(out) as draft:
        if is_parquet(out):
            parquet.write_table(_filled_parquet(sources, known), draft)
            return
        dialect, names = files[0].dialect, files[0].names
        with text_writer(draft, out) as text:
            writer = csv.writer(text, delimiter=dialect.delimiter, lineterminator="\n")
            writer.writerow(names)
            start = 0
            for piece in _pieces(files):
                writer.writerows(_filled_rows(piece, names, known, start, dialect))
                start += len(piece[0])


def check_fill_target(out: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raise when the filled table cannot be written there."""
    check_table_target(out, overwrite)
    if any(is_parquet(path) != is_parquet(out) for path in sources):
        raise UserError(f"{out}: a filled table is written as its source is: name it like {sources[0].name}")


def _pieces(files: Sequence[TableFile]) -> Iterator[list[pa.Array]]:
    """The rows of all files, in the order of the first one's columns."""
    for file in files:
        order = [file.names.index(name) for name in files[0].names]
        for piece in file.pieces():
            yield [piece[k] for k in order]


def _filled_rows(
    piece: Sequence[pa.Array],
    names: Sequence[str],
    known: dict[str, tuple[Column, Values]],
    start: int,
    dialect: Dialect,
) -> Iterator[tuple[str, ...]]:
    """The rows of a piece, whose first one has the number `start`."""
    written: list[list[str]] = []
    for name, cells in zip(names, piece, strict=True):
        found = cells.to_pylist()
        if name in known:
            column, values = known[name]
            empty = np.flatnonzero(_empty(column, cells, dialect.decimal))
            for i, text in zip(empty, texts(column, values[start + empty], dialect.decimal), strict=True):
                found[i] = text
        written.append(found)
    return zip(*written, strict=True)


def _empty(column: Column, cells: pa.Array, decimal: str = ".") -> Any:
    """Which cells (N,) are missing; a text that merely is not known to the model is not."""
    blank = blanks(cells, markers(column.kind)).to_numpy(zero_copy_only=False)
    return np.isnan(encode(column, cells, decimal)) & blank


def _filled_parquet(sources: Sequence[Path], known: dict[str, tuple[Column, Values]]) -> pa.Table:
    """The rows of all files, each column in its own type."""
    tables = [parquet.read_table(path) for path in sources]
    names = tables[0].column_names
    # a column without a missing cell in one file may be of integers there, and of floats in the other
    table = pa.concat_tables([table.select(names) for table in tables], promote_options="permissive")
    for k, name in enumerate(table.column_names):
        if name in known:
            column, values = known[name]
            cells = table.column(k).combine_chunks()
            empty = pa.array(_empty(column, plain(cells)))
            made = arrow_cells(column, np.where(empty, values, np.nan), cells.type)
            table = table.set_column(k, table.field(k), pc.if_else(empty, made, cells))
    return table
