"""Conditions on rows, as people type them: `income=>50K`, `age>=30`, `since<2020-01-01`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..choice import nearest
from ..errors import UserError
from .columns import Column, Values, called, level_codes, markers, modelled
from .dates import seconds
from .late import Late
from .spelling import NUMBER, numbers

if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = Late("pyarrow")

Accepts = Callable[[Values], NDArray[np.bool_]]
Compare = Callable[[Values, float], NDArray[np.bool_]]
COMPARE: dict[str, Compare] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
SIGN = "|".join(COMPARE)


def condition(columns: Sequence[Column], texts: Sequence[str]) -> Accepts:
    """Which rows (N, D) of the modelled columns fulfil all conditions: (N,).

    Args:
        columns: What the values are.
        texts: Each a column, one of = != < <= > >=, and a level, number or date; nothing after = or != means missing.
            Blanks around a name or a level need not be typed. Levels that are all numbers have a size, too.

    Raises:
        UserError: A condition cannot be read, names no modelled column, or a level that was never seen.
    """
    tests = [_test(columns, text) for text in texts]
    return lambda values: np.logical_and.reduce([np.ones(len(values), bool), *(test(values) for test in tests)])


def equalities(columns: Sequence[Column], texts: Sequence[str]) -> Values:
    """What the conditions say a cell is, (D,); NaN where they say less than that."""
    known = np.full(len(modelled(columns)), np.nan)
    for text in texts:
        j, sign, value = _read(columns, text)
        if sign == "=" and value is not None:
            known[j] = value
    return known


def level_of(columns: Sequence[Column], name: str) -> tuple[int, list[str]]:
    """Place among the modelled columns, and the levels, of a column that rows are to be balanced by.

    Raises:
        UserError: There is no such column, or it has no levels.
    """
    kept = modelled(columns)
    names = [column.name for column in kept]
    meant = called(name, names)
    if meant is None:
        raise UserError(f"--balance {name}: no column {name!r}; {nearest(name, names)}")
    j = names.index(meant)
    if not kept[j].levels:
        advice = "name it in --categorical when fitting, if these are classes"
        raise UserError(f"--balance {name}: holds numbers; {advice}")
    return j, kept[j].levels


def _parts(names: Sequence[str], text: str) -> tuple[str, str, str] | None:
    """Name, sign and value; of names that fit the longest, as it stands or without the blanks around it."""
    for spelt in (str, str.strip):
        for name in sorted(names, key=len, reverse=True):
            match = re.fullmatch(rf"\s*{re.escape(spelt(name))}\s*({SIGN})(.*)", text, re.DOTALL)
            if match:
                return name, match[1], match[2]
    return None


def _read(columns: Sequence[Column], text: str) -> tuple[int, str, float | None]:
    """Which modelled column, which sign, and what the cells are compared with: None for missing."""
    names = [column.name for column in modelled(columns)]
    parts = _parts(names, text)
    if parts is None:
        raise _not_modelled(columns, text)
    name, sign, wanted = parts
    j = names.index(name)
    column = modelled(columns)[j]
    if sign in ("=", "!="):
        missing = wanted.strip().lower() in markers(column.kind) and np.isnan(level_codes(column, [wanted])[0])
        return j, sign, None if missing else _value(column, wanted, text)
    return j, sign, _bound(column, wanted, text)


def _not_modelled(columns: Sequence[Column], text: str) -> UserError:
    """Why a condition names no column that could be heeded."""
    unlearned = [column for column in columns if not column.modelled]
    parts = _parts([column.name for column in unlearned], text)
    if parts:
        kind = next(column.kind for column in unlearned if column.name == parts[0])
        why = "the same in all rows" if kind == "constant" else "a name of the row"
        return UserError(f"--where {text}: no column {parts[0]!r} to choose by: it is {why}, and not learned")
    match = re.fullmatch(rf"\s*(.+?)\s*({SIGN}).*", text, re.DOTALL)
    if match is None:
        return UserError(f"--where {text}: write COLUMN=VALUE, or another of {' '.join(COMPARE)}")
    names = [column.name for column in modelled(columns)]
    return UserError(f"--where {text}: no column {match[1]!r}; {nearest(match[1], names)}")


def _test(columns: Sequence[Column], text: str) -> Accepts:
    j, sign, value = _read(columns, text)
    if value is None:
        return lambda values: np.isnan(values[:, j]) == (sign == "=")
    levels = modelled(columns)[j].levels
    if levels and sign not in ("=", "!="):
        sizes = np.array([*map(float, levels), np.nan])  # the last one of missing cells
        return lambda values: COMPARE[sign](sizes[np.nan_to_num(values[:, j], nan=-1).astype(int)], value)
    return lambda values: COMPARE[sign](values[:, j], value) & ~np.isnan(values[:, j])


def _value(column: Column, wanted: str, text: str) -> float:
    """What the cells are to be equal to: the index of a level, or a number."""
    if not column.levels:
        return _bound(column, wanted, text)
    code = float(level_codes(column, [wanted])[0])
    if np.isnan(code):
        known = nearest(wanted.strip(), column.levels)
        raise UserError(f"--where {text}: {wanted.strip()!r} was never seen; {known}")
    return code


def _bound(column: Column, wanted: str, text: str) -> float:
    """What the size of the cells is compared with."""
    wanted = wanted.strip()
    if column.levels and not all(re.match(NUMBER, level.strip()) for level in column.levels):
        raise UserError(f"--where {text}: {column.name!r} holds categories, which are compared with = or !=")
    if column.kind == "date":
        layouts = (column.format or "%Y-%m-%d", "%Y-%m-%d")
        value = next((value for layout in layouts if not np.isnan(value := seconds([wanted], layout)[0])), np.nan)
        if np.isnan(value):
            raise UserError(f"--where {text}: {wanted!r} is not a date as in the table ({column.format})")
        return float(value)
    for decimal in (".", ","):
        with suppress(pa.ArrowInvalid):
            value = numbers(pa.array([wanted]), column.spelling(decimal))[0].as_py()
            if not np.isnan(value):
                return value
    raise UserError(f"--where {text}: {column.name!r} holds numbers, and {wanted!r} is none")
