"""What one column of a table is, and how its cells become numbers and text again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dates import date_texts, seconds, stamps
from .late import Late
from .spelling import INTEGER, NUMBER, PADDED, Spelling, number_text, numbers, pc

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
else:
    pa, pd = Late("pyarrow"), Late("pandas")

Kind = Literal["number", "integer", "category", "boolean", "date", "id", "constant"]
Values = NDArray[np.float64]

# what stands for a missing cell, in small letters and without blanks around it
MARKERS = ("", "na", "n/a", "#n/a", "nan", "<na>", "nat", "?", "null")
OTHER_MARKERS = (*MARKERS, "none")  # in columns of other things than texts, where "none" is no text like another
FEW_VALUES, REPEATED = 20, 20  # so many numbers, each in so many rows on average, are levels like those of a category
# a number in so many rows, and so many times as many as those next to it, is a level too; at most so many of them
SPIKE_ROWS, STANDS_OUT, BESIDE, MOST_SPIKES = 25, 4, 5, 40


@dataclass(frozen=True)
class Column:
    """One column of a table: how to read it, what it may hold, how to write it. `dataclasses.asdict` is its JSON.

    Args:
        name: As in the header.
        kind: "number" and "integer" are kept as they are, "category" and "boolean" as the index of their level, "date"
            as seconds since 1970 (of UTC, or of the local time whose offset all share). "id" (a name of the row) and
            "constant" carry no information: not modelled.
        levels: The categories as written in the source, most frequent first; a boolean's are false, then true.
        missing: How a missing cell is written; None where the column has none.
        decimals: Numbers lie on a grid of so many decimals (0 for integers); None where they are continuous.
        low: Smallest value of the training part.
        high: Largest value of the training part.
        spikes: Values of a number or date that far more rows of the training part share than those beside them, rising.
        other: Whether a number or date has other values than these.
        step: Grid of dates in seconds: 86400 for days, 60 for minutes, 1, 0.001, 0.000001.
        format: Of dates, and of levels and constants that are dates in Parquet, the strptime format; of ids the
            str.format of a running number.
        value: The text of a constant; None where every cell is missing.
        dtype: Arrow type in a Parquet source; None in a text file.
        point: Whether whole numbers are written with a point ("3.0").
        digits: How many digits follow the point of each number, or of the seconds of each time; None where they differ.
        decimal: The decimal mark of its numbers, where it is not that of the table.
        thousands: What stands between groups of three digits.
        affix: What stands around each number, as a str.format: "${}", "{} kg".
        bare: Directives of the format, such as dm, that are written without a leading zero.
    """

    name: str
    kind: Kind
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
        """Whether it is one of the D columns that training sees."""
        return self.kind not in ("id", "constant")

    def spelling(self, decimal: str = ".") -> Spelling:
        """How its numbers are spelt in a table with this decimal mark."""
        return Spelling(self.decimal or decimal, self.thousands, self.affix)


def called(name: str, names: Sequence[str]) -> str | None:
    """The name that is meant: as it stands, or without the blanks around it; None if there is none."""
    return name if name in names else next((known for known in names if known.strip() == name.strip()), None)


def modelled(columns: Sequence[Column]) -> list[Column]:
    """The columns that training sees, in their order: one for each column of the values (N, D)."""
    return [column for column in columns if column.modelled]


def spikes(known: Values) -> tuple[list[float], bool]:
    """The values that many of the cells (N,) share, and whether there are others; all of them where they are few.

    Such a value stands out among its neighbours in size: 2,000 among payments, or the gain that one item of a tax form
    asks for. What goes with it (who is asked) goes with it alone, and is hard to see where numbers run on.
    """
    value, times = np.unique(known, return_counts=True)
    if len(value) <= FEW_VALUES and len(known) >= REPEATED * len(value):
        return value.tolist(), False
    beside = np.lib.stride_tricks.sliding_window_view(np.pad(times.astype(float), BESIDE), 2 * BESIDE + 1)
    shared = times >= np.maximum(STANDS_OUT * np.median(beside, 1), SPIKE_ROWS)
    most = np.argsort(times[shared], kind="stable")[-MOST_SPIKES:]
    return np.sort(value[shared][most]).tolist(), True


def markers(kind: Kind) -> tuple[str, ...]:
    """What stands for a missing cell in a column of this kind, in small letters."""
    return MARKERS if kind == "category" else OTHER_MARKERS


def blanks(cells: pa.Array, markers: Sequence[str] = OTHER_MARKERS) -> pa.BooleanArray:
    """Which cells (texts or numbers) are missing."""
    if pa.types.is_floating(cells.type):
        return pc.is_null(cells, nan_is_null=True)
    small = pc.utf8_lower(pc.utf8_trim_whitespace(cells))
    marked = pc.is_in(small, value_set=pa.array(markers))
    return pc.or_(pc.is_null(cells), marked)


def encode(column: Column, cells: pa.Array, decimal: str = ".") -> Values:
    """Cells (N,) of a modelled column as float64: NaN where they are missing, or no level or date of this column.

    Raises:
        pyarrow.ArrowInvalid: A cell of a number column is not a number.
    """
    if column.levels:
        return _look_up(column, cells)
    if pa.types.is_floating(cells.type):
        return cells.to_numpy(zero_copy_only=False)
    cells = pc.if_else(blanks(cells), None, cells)
    if column.kind != "date":
        return numbers(cells, column.spelling(decimal)).to_numpy(zero_copy_only=False)
    assert column.format is not None
    packed = cells.dictionary_encode()
    return _unpack(packed, seconds(packed.dictionary.to_pylist(), column.format))


def _unpack(packed: pa.DictionaryArray, values: Values) -> Values:
    """The value of each cell (N,), from those of the different ones; NaN where it is missing."""
    return np.append(values, np.nan)[pc.fill_null(packed.indices, -1).to_numpy(zero_copy_only=False)]


def level_codes(column: Column, texts: Sequence[str]) -> Values:
    """Index of each level; NaN where a text is none, as it stands or in its plain form."""
    plain = [_plain(level, column.kind == "boolean") for level in column.levels]
    known = {text: float(k) for spelt in (plain, column.levels) for k, text in enumerate(spelt)}
    found = [known.get(text, known.get(_plain(text, column.kind == "boolean"), np.nan)) for text in texts]
    return np.array(found, np.float64)


def _look_up(column: Column, cells: pa.Array) -> Values:
    packed = cells.dictionary_encode()
    words = packed.dictionary.to_pylist()
    if pa.types.is_floating(cells.type):
        words = date_texts(np.array(words), column.format) if column.format else [number_text(v) for v in words]
    return _unpack(packed, level_codes(column, words))


def _plain(text: str, boolean: bool) -> str:
    """A level as other programs may write it: without blanks around it, 1.0 as 1, TRUE as true."""
    text = text.strip().lower() if boolean else text.strip()
    return number_text(float(text)) if re.match(NUMBER, text) else text


def snap(column: Column, values: Values) -> Values:
    """Values of a number, integer or date column on the column's grid."""
    if column.kind == "date" and column.step:
        return np.rint(values / column.step) * column.step
    return values if column.decimals is None else np.round(values, column.decimals)


def on_grid(columns: Sequence[Column], values: Values) -> Values:
    """Values (N, D) of the modelled columns as they would be written and read back: rounded, levels in their range."""
    columns = modelled(columns)
    snapped = [
        _codes(c, np.nan_to_num(v)) * 1.0 if c.levels else snap(c, v) for c, v in zip(columns, values.T, strict=True)
    ]
    return np.where(np.isnan(values), np.nan, np.stack(snapped, 1))


def _codes(column: Column, values: Values) -> NDArray[np.int64]:
    return np.clip(np.rint(values), 0, len(column.levels) - 1).astype(np.int64)


def running(column: Column, count: int, start: int = 0) -> list[int]:
    """New ids of an id column for the rows from `start` on: 1, 2, 3 ..., or 0, 1, 2 ... where the source does so."""
    first = start + (0 if column.low == 0 else 1)
    return list(range(first, first + count))


def texts(column: Column, values: Values, decimal: str = ".", start: int = 0) -> list[str]:
    """Cells as they are written in a text file.

    Args:
        column: What they are.
        values: (N,); those of ids and constants are ignored.
        decimal: The decimal mark.
        start: Number of the first row, for ids.
    """
    if column.kind == "constant":
        return [column.missing or "" if column.value is None else column.value] * len(values)
    if column.kind == "id":
        return [(column.format or "{}").format(number) for number in running(column, len(values), start)]
    blank = np.isnan(values)
    filled = np.where(blank, 0.0, values)
    if column.levels:
        written = [column.levels[code] for code in _codes(column, filled)]
    elif column.kind == "date":
        written = date_texts(snap(column, filled), column.format or "%Y-%m-%d", column.digits, column.bare)
    else:
        spelling, snapped = column.spelling(decimal), snap(column, filled).tolist()
        written = [number_text(value, spelling, column.point, column.digits) for value in snapped]
    for i in np.flatnonzero(blank):
        written[i] = column.missing or ""
    return written


def absent(column: Column, values: Values) -> NDArray[np.bool_]:
    """Which cells (N,) are written as missing."""
    if column.modelled:
        return np.isnan(values)
    return np.full(len(values), column.kind == "constant" and column.value is None)


def series(column: Column, values: Values) -> pd.Series:
    """Cells with the type they have, from values (N,): Int64, boolean and so on where the column has missing cells."""
    count, blank = len(values), absent(column, values)
    if column.kind == "constant":
        found = _objects(column, [column.value or ""]).repeat(count)
    elif column.kind == "id":
        found = np.array(running(column, count) if column.decimals == 0 else texts(column, values))
    else:
        found = _typed(column, np.where(blank, 0.0, values))
    found = pd.Series(found)
    if column.missing is None and not blank.any():
        return found
    nullable = {"i": "Int64", "b": "boolean"}.get(found.dtype.kind)
    return (found.astype(nullable) if nullable else found).mask(blank)


def _typed(column: Column, values: Values) -> pd.Series | NDArray[Any]:
    if column.levels:
        return _objects(column, column.levels)[_codes(column, values)]
    if column.kind == "date":
        return stamps(snap(column, values))
    snapped = snap(column, values)
    return snapped.astype(np.int64) if column.kind == "integer" and not column.point else snapped


def _objects(column: Column, levels: Sequence[str]) -> NDArray[Any]:
    """Levels as the values they stand for: dates, booleans, integers, numbers or texts."""
    if column.format:
        return stamps(seconds(levels, column.format)).to_numpy()
    plain = [level.strip().lower() for level in levels]
    words = column.dtype is not None and "string" in column.dtype
    if not words and not any(re.match(PADDED, text) for text in plain):
        if set(plain) <= {"true", "false"}:
            return np.array([text == "true" for text in plain])
        for pattern, kind in ((INTEGER, int), (NUMBER, float)):
            if all(re.match(pattern, text) for text in plain):
                return np.array([kind(text) for text in plain])
    return np.array(levels, dtype=object)
