"""A column of a table: its type and format, and the conversion of its cells to numbers and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.dates import format_dates, parse_dates, to_datetimes
from sfumato.modalities.table.numbers import (
    INTEGER,
    NUMBER,
    ZERO_PADDED,
    NumberFormat,
    format_number,
    parse_numbers,
    pc,
)
from sfumato.registry import nearest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
else:
    pa, pd = LazyModule("pyarrow"), LazyModule("pandas")

ColumnKind = Literal["number", "integer", "category", "boolean", "date", "id", "constant"]
Values = NDArray[np.float64]

# texts of a missing cell, lower case and stripped
MISSING_MARKERS = ("", "na", "n/a", "#n/a", "nan", "<na>", "nat", "?", "null")
NUMBER_MISSING_MARKERS = (*MISSING_MARKERS, "none")  # in columns other than categories, where "none" may be a level
MAX_DISCRETE_VALUES = 20  # maximum number of distinct values of a discrete number, all of which are spikes (atoms)
MIN_REPEATS = 20  # minimum number of rows per distinct value of a discrete number, on average
MIN_SPIKE_ROWS = 25  # minimum number of rows of a spike of another number
SPIKE_RATIO = 4  # minimum number of rows of a spike, relative to the median of the neighbouring values
SPIKE_WINDOW = 5  # neighbouring values on each side
MAX_SPIKES = 40  # maximum number of spikes; the most frequent ones are kept


@dataclass(frozen=True)
class Column:
    """One column of a table: how its cells are read, which values it has, how they are written.

    `dataclasses.asdict` is its JSON.

    Args:
        name: As in the header.
        kind: The values of "number" and "integer" are the numbers, of "category" and "boolean" the indices of levels,
            of "date" seconds since 1970 (UTC, or local time with one shared offset). "id" (unique per row) and
            "constant" carry no information and are not modelled.
        levels: Levels of a category as in the source, most frequent first; of a boolean false, then true.
        missing: Text of a missing cell; None if no cell is missing.
        decimals: Decimals of a number (0 for integers), the grid of its values; None if continuous.
        low: Smallest value in the training part.
        high: Largest value in the training part.
        spikes: Over-represented values (atoms) of a number or date in the training part, ascending.
        other: Whether a number or date has other values than these.
        step: Grid of a date in seconds: 86400 for days, 60 for minutes, 1, 0.001, 0.000001.
        format: strptime format of a date, or of levels and constants that are dates in Parquet; str.format of an id's
            running number.
        value: Text of a constant; None if every cell is missing.
        dtype: Arrow type in a Parquet source; None in a text file.
        point: Whether integers are written with a decimal mark ("3.0").
        digits: Number of decimals that every number, or the seconds of every time, is written with; None if they vary.
        decimal: Decimal mark of the column, if not that of the table.
        thousands: Thousands separator.
        affix: Text around each number, as a str.format: "${}", "{} kg".
        bare: Directives of a date's format, such as dm, that are written without a leading zero.
    """

    name: str
    kind: ColumnKind
    levels: list[str] = field(default_factory=list)
    missing: str | None = None
    decimals: int | None = None
    low: float | None = None
    high: float | None = None
    spikes: list[float] = field(default_factory=list)
    other: bool = True
    step: float | None = None
    format: str | None = None
    value: str | None = None
    dtype: str | None = None
    point: bool = False
    digits: int | None = None
    decimal: str | None = None
    thousands: str = ""
    affix: str = "{}"
    bare: str = ""

    @property
    def modelled(self) -> bool:
        """Whether it is one of the D columns that are modelled."""
        return self.kind not in ("id", "constant")

    def number_format(self, decimal: str = ".") -> NumberFormat:
        """The format of its numbers in a table with this decimal mark."""
        return NumberFormat(self.decimal or decimal, self.thousands, self.affix)


def find_name(name: str, names: Sequence[str]) -> str | None:
    """The column of this name, exactly or without surrounding blanks; None if there is none."""
    return name if name in names else next((other for other in names if other.strip() == name.strip()), None)


def modelled(columns: Sequence[Column]) -> list[Column]:
    """The modelled columns in their order, one per column of the values (N, D)."""
    return [column for column in columns if column.modelled]


def find_spikes(values: Values) -> tuple[list[float], bool]:
    """The over-represented values (atoms) among values (N,), and whether there are others.

    A spike stands out among neighbouring values: 2,000 among payments, or the standard gain of an item in a tax form.
    Other columns may depend on this one value, which a model of continuous numbers hardly learns.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= MAX_DISCRETE_VALUES and len(values) >= MIN_REPEATS * len(distinct):
        return distinct.tolist(), False
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(counts.astype(float), SPIKE_WINDOW), 2 * SPIKE_WINDOW + 1)
    is_spike = counts >= np.maximum(SPIKE_RATIO * np.median(windows, 1), MIN_SPIKE_ROWS)
    most_frequent = np.argsort(counts[is_spike], kind="stable")[-MAX_SPIKES:]
    return np.sort(distinct[is_spike][most_frequent]).tolist(), True


def missing_markers(kind: ColumnKind) -> tuple[str, ...]:
    """Texts of a missing cell in a column of this kind, lower case."""
    return MISSING_MARKERS if kind == "category" else NUMBER_MISSING_MARKERS


def missing_mask(cells: pa.Array, markers: Sequence[str] = NUMBER_MISSING_MARKERS) -> pa.BooleanArray:
    """Which cells (texts or numbers) are missing."""
    if pa.types.is_floating(cells.type):
        return pc.is_null(cells, nan_is_null=True)
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(cells))
    return pc.or_(pc.is_null(cells), pc.is_in(texts, value_set=pa.array(markers)))


def parse_cells(column: Column, cells: pa.Array, decimal: str = ".") -> Values:
    """Cells (N,) of a modelled column as float64: NaN if missing, or not a level or date of this column.

    Raises:
        pyarrow.ArrowInvalid: A cell of a number column is not a number.
    """
    if column.levels:
        return _parse_levels(column, cells)
    if pa.types.is_floating(cells.type):
        return cells.to_numpy(zero_copy_only=False)
    cells = pc.if_else(missing_mask(cells), None, cells)
    if column.kind != "date":
        return parse_numbers(cells, column.number_format(decimal)).to_numpy(zero_copy_only=False)
    assert column.format is not None
    encoded = cells.dictionary_encode()
    return _decode_dictionary(encoded, parse_dates(encoded.dictionary.to_pylist(), column.format))


def _decode_dictionary(encoded: pa.DictionaryArray, values: Values) -> Values:
    """The value of each cell (N,), given those of the distinct cells; NaN if missing."""
    return np.append(values, np.nan)[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)]


def level_indices(column: Column, texts: Sequence[str]) -> Values:
    """Index of each level, compared exactly and in normal form; NaN for a text that is no level."""
    boolean = column.kind == "boolean"
    normal = [_normalise_level(level, boolean) for level in column.levels]
    index = {text: float(k) for levels in (normal, column.levels) for k, text in enumerate(levels)}
    found = [index.get(text, index.get(_normalise_level(text, boolean), np.nan)) for text in texts]
    return np.array(found, np.float64)


def _parse_levels(column: Column, cells: pa.Array) -> Values:
    encoded = cells.dictionary_encode()
    levels = encoded.dictionary.to_pylist()
    if pa.types.is_floating(cells.type):
        levels = format_dates(np.array(levels), column.format) if column.format else [format_number(v) for v in levels]
    return _decode_dictionary(encoded, level_indices(column, levels))


def _normalise_level(text: str, boolean: bool) -> str:
    """A level independent of the program that wrote it: without surrounding blanks, 1.0 as 1, TRUE as true."""
    text = text.strip().lower() if boolean else text.strip()
    return format_number(float(text)) if re.match(NUMBER, text) else text


def round_column(column: Column, values: Values) -> Values:
    """Values of a number, integer or date column, rounded to the column's grid."""
    if column.kind == "date" and column.step:
        return np.rint(values / column.step) * column.step
    return values if column.decimals is None else np.round(values, column.decimals)


def round_values(columns: Sequence[Column], values: Values) -> Values:
    """Values (N, D) of the modelled columns as writing and reading back gives them: numbers rounded, levels clipped."""
    columns = modelled(columns)
    rounded = [
        _clip_levels(c, np.nan_to_num(v)) * 1.0 if c.levels else round_column(c, v)
        for c, v in zip(columns, values.T, strict=True)
    ]
    return np.where(np.isnan(values), np.nan, np.stack(rounded, 1))


def _clip_levels(column: Column, values: Values) -> NDArray[np.int64]:
    return np.clip(np.rint(values), 0, len(column.levels) - 1).astype(np.int64)


def sequential_ids(column: Column, count: int, start: int = 0) -> list[int]:
    """New ids of an id column for the rows from `start` on: 1, 2, 3 ..., or 0, 1, 2 ... if the source starts at 0."""
    first = start + (0 if column.low == 0 else 1)
    return list(range(first, first + count))


def format_cells(column: Column, values: Values, decimal: str = ".", start: int = 0) -> list[str]:
    """Cells as a text file has them.

    Args:
        column: Their column.
        values: Values (N,); ignored for ids and constants.
        decimal: Decimal mark of the table.
        start: Number of the first row, for ids.
    """
    if column.kind == "constant":
        return [column.missing or "" if column.value is None else column.value] * len(values)
    if column.kind == "id":
        return [(column.format or "{}").format(number) for number in sequential_ids(column, len(values), start)]
    missing = np.isnan(values)
    present = np.where(missing, 0.0, values)
    if column.levels:
        texts = [column.levels[index] for index in _clip_levels(column, present)]
    elif column.kind == "date":
        texts = format_dates(round_column(column, present), column.format or "%Y-%m-%d", column.digits, column.bare)
    else:
        number_format, rounded = column.number_format(decimal), round_column(column, present).tolist()
        texts = [format_number(value, number_format, column.point, column.digits) for value in rounded]
    for i in np.flatnonzero(missing):
        texts[i] = column.missing or ""
    return texts


def missing_cells(column: Column, values: Values) -> NDArray[np.bool_]:
    """Which cells (N,) are written as missing."""
    if column.modelled:
        return np.isnan(values)
    return np.full(len(values), column.kind == "constant" and column.value is None)


def to_series(column: Column, values: Values) -> pd.Series:
    """Values (N,) as a pandas series of the column's type; nullable (Int64, boolean) if it can have missing cells."""
    count, missing = len(values), missing_cells(column, values)
    if column.kind == "constant":
        cells = _level_objects(column, [column.value or ""]).repeat(count)
    elif column.kind == "id":
        cells = np.array(sequential_ids(column, count) if column.decimals == 0 else format_cells(column, values))
    else:
        cells = _to_objects(column, np.where(missing, 0.0, values))
    cells = pd.Series(cells)
    if column.missing is None and not missing.any():
        return cells
    nullable = {"i": "Int64", "b": "boolean"}.get(cells.dtype.kind)
    return (cells.astype(nullable) if nullable else cells).mask(missing)


def _to_objects(column: Column, values: Values) -> pd.Series | NDArray[Any]:
    if column.levels:
        return _level_objects(column, column.levels)[_clip_levels(column, values)]
    if column.kind == "date":
        return to_datetimes(round_column(column, values))
    rounded = round_column(column, values)
    return rounded.astype(np.int64) if column.kind == "integer" and not column.point else rounded


def _level_objects(column: Column, levels: Sequence[str]) -> NDArray[Any]:
    """Levels as dates, booleans, integers, numbers or texts, whichever all of them are."""
    if column.format:
        return to_datetimes(parse_dates(levels, column.format)).to_numpy()
    texts = [level.strip().lower() for level in levels]
    is_string = column.dtype is not None and "string" in column.dtype
    if not is_string and not any(re.match(ZERO_PADDED, text) for text in texts):
        if set(texts) <= {"true", "false"}:
            return np.array([text == "true" for text in texts])
        for pattern, kind in ((INTEGER, int), (NUMBER, float)):
            if all(re.match(pattern, text) for text in texts):
                return np.array([kind(text) for text in texts])
    return np.array(levels, dtype=object)


def columns_from_spec(spec: Mapping[str, Any]) -> list[Column]:
    """The columns of `TableDataset.spec`."""
    return [Column(**column) for column in spec["columns"]]


def target_index(name: str | None, columns: Sequence[Column]) -> int:
    """Index of the target among the modelled columns; by default the last one.

    Raises:
        UserError: No modelled column has this name.
    """
    names = [column.name for column in columns]
    found = names[-1] if name is None else find_name(name, names)
    if found is None:
        raise UserError(f"--target {name}: no such column among those that are learned; {nearest(str(name), names)}")
    return names.index(found)
