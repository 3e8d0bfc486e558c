"""Tables: from a file to TableData."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..choice import nearest
from ..errors import UserError
from ..types import Batch
from .base import Index, split
from .cache import allocate
from .columns import Column, Values, blanks, called, encode, markers, modelled, spikes
from .files import first_few, inventory
from .late import Late
from .rows import DELIMITERS, TABLE, Dialect, TableFile, check_readable, open_table
from .tally import Meant, Tally

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet
else:
    pa, parquet, pd = Late("pyarrow"), Late("pyarrow.parquet"), Late("pandas")

FEWEST = 20  # rows from which a model can be trained at all
HELD = ("test", "validation", "val")  # names of the held-out file beside train.csv
PIECE = 2**16  # rows read at a time
PLURALS = {
    **{"number": "numbers", "integer": "integers", "category": "categories", "boolean": "yes or no", "date": "dates"},
    **{"id": "names of rows, not learned", "constant": "always the same, not learned"},
}


@dataclass(eq=False)
class TableData:
    """Rows of a table as numbers; what `Data` is for images.

    Args:
        store: The modelled columns (M, D) in float64: numbers, level indices, seconds; NaN where missing. Shared
            between subsets.
        columns: All columns of the source; `modelled(columns)` are those of the store.
        dialect: How a text source is written.
        rows: Which rows of `store` are the items (N,); default all of them.
        notes: Lines worth telling the user about how the data were read.
        file: sha256 of the file they are from, if they are from one.
    """

    classes: ClassVar[int] = 0
    fewest_held: ClassVar[int] = 20  # comparing tables needs so many
    captions: ClassVar[None] = None
    names: ClassVar[None] = None

    store: Values
    columns: list[Column]
    dialect: Dialect = field(default_factory=Dialect)
    rows: NDArray[np.int64] | None = None
    notes: list[str] = field(default_factory=list)
    file: str = ""
    labels: NDArray[np.int64] | None = None
    label_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.store.shape[1:] == (len(modelled(self.columns)),), self.store.shape
        assert self.store.dtype == np.float64 and self.labels is None

    def __len__(self) -> int:
        return len(self.store) if self.rows is None else len(self.rows)

    @property
    def mode(self) -> dict[str, Any]:
        """What the numbers mean, as JSON can hold it: the columns, and how a text source is written."""
        return {"columns": [asdict(column) for column in self.columns], "dialect": asdict(self.dialect)}

    @property
    def shape(self) -> tuple[int]:
        """(D,) of one row."""
        return (self.store.shape[1],)

    def described(self) -> list[str]:
        """What the columns were found to be: a line for each kind."""
        kinds = {column.kind: [c.name for c in self.columns if c.kind == column.kind] for column in self.columns}
        return [f"{PLURALS[kind]}: {', '.join(names)}" for kind, names in kinds.items()]

    @property
    def values(self) -> Values:
        """The rows (N, D); a copy when this is a subset."""
        return self.store if self.rows is None else self.store[self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content: what the columns are, and the values."""
        what = [(c.name, c.kind, c.levels) for c in self.columns]
        digest = hashlib.sha256(repr(("table", self.store.shape, what)).encode())
        for start in range(0, len(self.store), PIECE):
            digest.update(np.ascontiguousarray(self.store[start : start + PIECE]).data)
        digest.update(b"-" if self.rows is None else self.rows.tobytes())
        return digest.hexdigest()

    @property
    def origin(self) -> str:
        """What the choice of held-out rows hangs on: the file, however its columns are read."""
        return self.file or self.fingerprint

    def batch(self, index: Index) -> Batch:
        """The rows `index` (B,) in float64 (B, D)."""
        where = np.asarray(index, dtype=np.int64).reshape(-1)
        taken = self.store.take(where if self.rows is None else self.rows[where], axis=0)
        return Batch(torch.from_numpy(taken), torch.from_numpy(where))

    def subset(self, index: Index) -> TableData:
        """The rows `index` (B,) as TableData of their own; the values are shared, not copied."""
        where = np.asarray(index, dtype=np.int64).reshape(-1)
        part = replace(self, rows=where if self.rows is None else self.rows[where], file="")
        part.__dict__["fingerprint"] = hashlib.sha256(self.fingerprint.encode() + where.tobytes()).hexdigest()
        return part


# -- reading


def is_table(source: str | Path) -> bool:
    """Whether a source looks like a table: a file called so, or a folder with train.csv (.tsv, .parquet ...)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return any(TABLE.sub("", file.name).lower() == "train" for file in path.iterdir() if TABLE.search(file.name))
    return bool(TABLE.search(path.name))


def read_table(
    source: str | Path,
    *,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    exclude: Sequence[str] = (),
    held_out: float = 0.1,
) -> tuple[TableData, TableData]:
    """Training and held-out rows of a table, with their columns found out from both (see `tally`).

    Args:
        source: A .csv, .tsv (also .gz) or .parquet with a header; or a folder with train.csv and, held out, test.csv.
        categorical: Columns that are categories though they look like numbers.
        numeric: Columns that are numbers though they look like categories, or like names of the rows.
        exclude: Columns to leave out.
        held_out: Share held out where there is no test.csv: a tenth, 5,000 rows at most (see `split`).

    Raises:
        UserError: What is wrong with the source, and what to do.
    """
    path = Path(source).expanduser()
    files = _same_header([open_table(file) for file in table_files(path)])
    names = files[0].names
    meant: dict[str, Meant] = dict.fromkeys(_meant(f"{source}: categorical", categorical, names), "category")
    for name in _meant(f"{source}: numeric", numeric, names):
        if name in meant:
            raise UserError(f"{source}: column {name!r} cannot be both categorical and numeric")
        meant[name] = "number"
    left_out = _meant(f"{source}: exclude", exclude, names)
    for file in files:
        check_readable(file, set(file.names) - left_out)
    notes = _first_notes(files[0])
    columns, counts = _infer(files, meant, left_out, notes)
    data = TableData(allocate((sum(counts), len(modelled(columns))), np.float64), columns, files[0].dialect)
    start = 0
    for file, count in zip(files, counts, strict=True):
        _fill(data.store[start : start + count], columns, file, notes)
        start += count
    data.notes = notes
    if len(counts) == 1:
        data.file = _hashed(files[0].path)
        return _with_range(*split(data, held_out))
    return _with_range(data.subset(np.arange(counts[0])), data.subset(np.arange(counts[0], start)))


def read_rows(path: str | Path, columns: Sequence[Column]) -> TableData:
    """The rows of one file under columns that are known: of samples, say. Ids and constants need not be there.

    Args:
        path: A .csv, .tsv or .parquet with a header.
        columns: What each column is; a category they do not know is read as missing, and noted.

    Raises:
        UserError: The file is no table, lacks a column, or has text where a number should be.
    """
    file = open_table(Path(path).expanduser())
    check_readable(file, {column.name for column in modelled(columns)})
    lacking = [column.name for column in modelled(columns) if column.name not in file.names]
    if lacking:
        raise UserError(f"{path}: lacks the column{'s' * (len(lacking) > 1)} {first_few(map(repr, lacking))}", code=1)
    notes = _first_notes(file)
    extra = sorted(set(file.names) - {column.name for column in columns})
    if extra:
        notes.append(f"{path}: not in the model, and left out: {first_few(map(repr, extra))}")
    count = sum(len(piece[0]) for piece in file.pieces())
    if not count:
        raise UserError(f"{path}: holds no rows", code=1)
    store = allocate((count, len(modelled(columns))), np.float64)
    data = TableData(store, list(columns), file.dialect, notes=notes, file=_hashed(file.path))
    _fill(data.store, data.columns, file, notes)
    return data


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _meant(what: str, given: Sequence[str], names: Sequence[str]) -> set[str]:
    """The columns that are meant by the names given."""
    found = set[str]()
    for name in given:
        meant = called(name, names)
        if meant is None:
            raise UserError(f"{what}: no column {name!r}; {nearest(name, names)}")
        found.add(meant)
    return found


def table_files(path: Path) -> list[Path]:
    """The training file, and the held-out one where there is one."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        if not TABLE.search(path.name):
            raise UserError(f"{path}: not a table; want .csv, .tsv or .parquet")
        return [path]
    tables = {TABLE.sub("", file.name).lower(): file for file in sorted(path.iterdir()) if TABLE.search(file.name)}
    if "train" not in tables:
        found = inventory(file.name for file in path.iterdir())
        raise UserError(f"{path}: no train.csv (or .tsv, .parquet) here, found {found}; name the file itself", code=1)
    held = next((tables[name] for name in HELD if name in tables), None)
    return [tables["train"], held] if held else [tables["train"]]


def _same_header(files: list[TableFile]) -> list[TableFile]:
    names = files[0].names
    for file in files[1:]:
        differing = sorted(set(names) ^ set(file.names))
        if differing:
            place = f"{file.path}: has other columns than {files[0].path.name}"
            raise UserError(f"{place}: {first_few(map(repr, differing))}; both need the same header", code=1)
    return files


def _first_notes(file: TableFile) -> list[str]:
    delimiter = file.dialect.delimiter
    notes = [f"{file.path}: the delimiter is {DELIMITERS[delimiter]}"] if delimiter != "," else []
    return [*notes, f"{file.path}: decimals have a comma"] if file.dialect.decimal == "," else notes


def _infer(
    files: list[TableFile], meant: Mapping[str, Meant], exclude: set[str], notes: list[str]
) -> tuple[list[Column], list[int]]:
    """What each column is, and the number of rows of each file."""
    first = files[0]
    tallies = {
        name: Tally(name, first.path, dtype, first.dialect.decimal)
        for name, dtype in zip(first.names, first.dtypes, strict=True)
        if name not in exclude
    }
    counts: list[int] = []
    for file in files:
        counts.append(0)
        for piece in file.pieces():
            counts[-1] += len(piece[0])
            for name, cells in zip(file.names, piece, strict=True):
                if name in tallies:
                    tallies[name].add(cells)
        for tally in tallies.values():
            tally.end_file()
    if counts[0] < FEWEST or not all(counts):
        few = next((i for i, count in enumerate(counts) if not count), 0)
        wanted = "a row" if few else f"{FEWEST} rows"
        raise UserError(f"{files[few].path}: has {counts[few]} rows; at least {wanted} are needed", code=1)
    columns = [tally.column(meant.get(tally.name), notes) for tally in tallies.values()]
    _say_unmodelled(columns, first.path, notes)
    marked = [f"{column.missing!r} in {column.name!r}" for column in columns if column.missing]
    if marked:
        notes.append(f"{first.path}: read as missing: {first_few(marked)}")
    return columns, counts


def _say_unmodelled(columns: list[Column], path: Path, notes: list[str]) -> None:
    """Note the ids and constants; raise when there is nothing else."""
    ids = [repr(column.name) for column in columns if column.kind == "id"]
    constants = [repr(column.name) for column in columns if column.kind == "constant"]
    if len(ids) + len(constants) == len(columns):
        found = f"{len(constants)} constant, {len(ids)} with a name for each row"
        raise UserError(f"{path}: no column can be learned from ({found}); add one that varies", code=1)
    if ids:
        notes.append(f"{path}: differ in every row, so new ones are numbered: {first_few(ids)}")
    if constants:
        notes.append(f"{path}: constant: {first_few(constants)}")


def _fill(store: Values, columns: list[Column], file: TableFile, notes: list[str]) -> None:
    """Read a file into its part of the store (n, D)."""
    start = 0
    lost: dict[str, int] = {}
    for piece in file.pieces():
        cells = dict(zip(file.names, piece, strict=True))
        for k, column in enumerate(modelled(columns)):
            try:
                values = encode(column, cells[column.name], file.dialect.decimal)
            except pa.ArrowInvalid as error:
                found = str(error).splitlines()[0]
                raise UserError(f"{file.path}: column {column.name!r} should hold numbers ({found})", code=1) from error
            store[start : start + len(values), k] = values
            there = ~blanks(cells[column.name], markers(column.kind)).to_numpy(zero_copy_only=False)
            lost[column.name] = lost.get(column.name, 0) + int((np.isnan(values) & there).sum())
        start += len(piece[0])
    strange = [f"{name!r} ({count})" for name, count in lost.items() if count > 0]
    if strange:
        notes.append(f"{file.path}: values the model does not know, read as missing: {first_few(strange)}")


def _with_range(train: TableData, held: TableData) -> tuple[TableData, TableData]:
    """Both parts, with the range and the spikes that each number has in the training part."""
    ranged, k = list(train.columns), 0
    for i, column in enumerate(train.columns):
        if column.modelled and not column.levels:
            values = train.store[:, k] if train.rows is None else train.store[train.rows, k]
            known = values[~np.isnan(values)]
            if known.size:
                shared, other = spikes(known)
                low, high = float(known.min()), float(known.max())
                ranged[i] = replace(column, low=low, high=high, spikes=shared, other=other)
        k += column.modelled
    train.columns = held.columns = ranged
    return train, held


# -- writing
