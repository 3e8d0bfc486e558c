"""Conditions on rows, as in `--where`: `income=>50K`, `age>=30`, `since<2020-01-01`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.columns import Column, Values, find_name, level_indices, missing_markers, modelled
from sfumato.modalities.table.dates import parse_dates
from sfumato.modalities.table.numbers import NUMBER, parse_numbers
from sfumato.registry import nearest

if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = LazyModule("pyarrow")

RowFilter = Callable[[Values], NDArray[np.bool_]]  # rows (N, D) -> which match (N,)
Comparison = Callable[[Values, float], NDArray[np.bool_]]
COMPARISONS: dict[str, Comparison] = {  # the two-character operators are tried first
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
OPERATOR = "|".join(COMPARISONS)


def parse_conditions(columns: Sequence[Column], conditions: Sequence[str]) -> RowFilter:
    """A filter of rows (N, D) of the modelled columns that match all conditions.

    Args:
        columns: Columns of the table.
        conditions: Each a column, one of = != < <= > >=, and a level, number or date; an empty value after = or !=
            means missing. Blanks around names and levels are optional. Levels that are all numbers are ordered.

    Raises:
        UserError: A condition is malformed, or its column is not modelled, or its level is unknown.
    """
    filters = [_filter(columns, condition) for condition in conditions]
    return lambda values: np.logical_and.reduce([np.ones(len(values), bool), *(matches(values) for matches in filters)])


def fixed_values(columns: Sequence[Column], conditions: Sequence[str]) -> Values:
    """The values (D,) that = conditions fix; NaN elsewhere."""
    values = np.full(len(modelled(columns)), np.nan)
    for condition in conditions:
        j, comparison, value = _parse(columns, condition)
        if comparison == "=" and value is not None:
            values[j] = value
    return values


def balance_levels(columns: Sequence[Column], name: str) -> tuple[int, list[str]]:
    """Index among the modelled columns, and the levels, of the column that rows are balanced by.

    Raises:
        UserError: There is no such column, or it is not a category.
    """
    candidates = modelled(columns)
    names = [column.name for column in candidates]
    found = find_name(name, names)
    if found is None:
        raise UserError(f"--balance {name}: no column {name!r}; {nearest(name, names)}")
    j = names.index(found)
    if not candidates[j].levels:
        advice = "name it in --categorical when fitting, if these are classes"
        raise UserError(f"--balance {name}: holds numbers; {advice}")
    return j, candidates[j].levels


def _split(names: Sequence[str], condition: str) -> tuple[str, str, str] | None:
    """Name, operator and value; the longest matching name, exactly or else without surrounding blanks."""
    for normalise in (str, str.strip):
        for name in sorted(names, key=len, reverse=True):
            match = re.fullmatch(rf"\s*{re.escape(normalise(name))}\s*({OPERATOR})(.*)", condition, re.DOTALL)
            if match:
                return name, match[1], match[2]
    return None


def _parse(columns: Sequence[Column], condition: str) -> tuple[int, str, float | None]:
    """Index of the modelled column, operator, and the value to compare with: None for missing."""
    names = [column.name for column in modelled(columns)]
    parts = _split(names, condition)
    if parts is None:
        raise _invalid_condition(columns, condition)
    name, comparison, text = parts
    j = names.index(name)
    column = modelled(columns)[j]
    if comparison not in ("=", "!="):
        return j, comparison, _parse_bound(column, text, condition)
    missing = text.strip().lower() in missing_markers(column.kind) and np.isnan(level_indices(column, [text])[0])
    return j, comparison, None if missing else _parse_value(column, text, condition)


def _invalid_condition(columns: Sequence[Column], condition: str) -> UserError:
    """Why a condition names no modelled column."""
    unmodelled = [column for column in columns if not column.modelled]
    parts = _split([column.name for column in unmodelled], condition)
    if parts:
        kind = next(column.kind for column in unmodelled if column.name == parts[0])
        reason = "constant" if kind == "constant" else "unique in every row"
        return UserError(f"--where {condition}: no column {parts[0]!r} in the model: it is {reason}, and not learned")
    match = re.fullmatch(rf"\s*(.+?)\s*({OPERATOR}).*", condition, re.DOTALL)
    if match is None:
        return UserError(f"--where {condition}: write COLUMN=VALUE, or another of {' '.join(COMPARISONS)}")
    names = [column.name for column in modelled(columns)]
    return UserError(f"--where {condition}: no column {match[1]!r}; {nearest(match[1], names)}")


def _filter(columns: Sequence[Column], condition: str) -> RowFilter:
    j, comparison, value = _parse(columns, condition)
    if value is None:
        return lambda values: np.isnan(values[:, j]) == (comparison == "=")
    levels = modelled(columns)[j].levels
    if levels and comparison not in ("=", "!="):
        numbers = np.array([*map(float, levels), np.nan])  # NaN for missing cells
        return lambda values: COMPARISONS[comparison](numbers[np.nan_to_num(values[:, j], nan=-1).astype(int)], value)
    return lambda values: COMPARISONS[comparison](values[:, j], value) & ~np.isnan(values[:, j])


def _parse_value(column: Column, text: str, condition: str) -> float:
    """The value after = or !=: the index of a level, or a number."""
    if not column.levels:
        return _parse_bound(column, text, condition)
    index = float(level_indices(column, [text])[0])
    if np.isnan(index):
        raise UserError(f"--where {condition}: {text.strip()!r} was never seen; {nearest(text.strip(), column.levels)}")
    return index


def _parse_bound(column: Column, text: str, condition: str) -> float:
    """The number or date to compare with."""
    text = text.strip()
    if column.levels and not all(re.match(NUMBER, level.strip()) for level in column.levels):
        raise UserError(f"--where {condition}: {column.name!r} holds categories, which compare with = or !=")
    if column.kind == "date":
        formats = (column.format or "%Y-%m-%d", "%Y-%m-%d")
        value = next((value for f in formats if not np.isnan(value := parse_dates([text], f)[0])), np.nan)
        if np.isnan(value):
            raise UserError(f"--where {condition}: {text!r} is not a date of the column's format ({column.format})")
        return float(value)
    for decimal in (".", ","):
        with suppress(pa.ArrowInvalid):
            value = parse_numbers(pa.array([text]), column.number_format(decimal))[0].as_py()
            if not np.isnan(value):
                return value
    raise UserError(f"--where {condition}: {column.name!r} holds numbers, and {text!r} is not a number")
