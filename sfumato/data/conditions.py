"""Conditions on rows, as people type them: `income=>50K`, `age>=30`, `since<2020-01-01`."""

import operator
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..choice import nearest
from ..errors import UserError
from .columns import Column, Values, markers, modelled, seconds

Accepts = Callable[[Values], NDArray[np.bool_]]
Compare = Callable[[Values, float], NDArray[np.bool_]]
COMPARE: dict[str, Compare] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
CONDITION = re.compile(rf"\s*(.+?)\s*({'|'.join(COMPARE)})\s*(.*?)\s*")


def condition(columns: Sequence[Column], texts: Sequence[str]) -> Accepts:
    """Which rows (N, D) of the modelled columns fulfil all conditions: (N,).

    Args:
        columns: What the values are.
        texts: Each a column, one of = != < <= > >=, and a level, number or date; nothing after = or != means missing.

    Raises:
        UserError: A condition cannot be read, names no modelled column, or a level that was never seen.
    """
    kept = modelled(columns)
    tests = [_test(kept, text) for text in texts]
    return lambda values: np.logical_and.reduce([np.ones(len(values), bool), *(test(values) for test in tests)])


def equalities(columns: Sequence[Column], texts: Sequence[str]) -> Values:
    """What the conditions say a cell is, (D,); NaN where they say less than that."""
    kept = modelled(columns)
    known = np.full(len(kept), np.nan)
    for text in texts:
        j, sign, value = _read(kept, text)
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
    if name not in names:
        raise UserError(f"--balance {name}: no column {name!r}; {nearest(name, names)}")
    j = names.index(name)
    if not kept[j].levels:
        advice = "name it in --categorical when fitting, if these are classes"
        raise UserError(f"--balance {name}: holds numbers; {advice}")
    return j, kept[j].levels


def _read(columns: Sequence[Column], text: str) -> tuple[int, str, float | None]:
    """Which column, which sign, and what the cells are compared with: None for missing."""
    match = CONDITION.fullmatch(text)
    if match is None:
        raise UserError(f"--where {text}: write COLUMN=VALUE, or another of {' '.join(COMPARE)}")
    name, sign, wanted = match.groups()
    names = [column.name for column in columns]
    if name not in names:
        raise UserError(f"--where {text}: no column {name!r}; {nearest(name, names)}")
    j = names.index(name)
    if sign in ("=", "!=") and wanted.lower() in markers(columns[j].kind) and wanted not in columns[j].levels:
        return j, sign, None
    return j, sign, _value(columns[j], sign, wanted, text)


def _test(columns: Sequence[Column], text: str) -> Accepts:
    j, sign, value = _read(columns, text)
    if value is None:
        return lambda values: np.isnan(values[:, j]) == (sign == "=")
    return lambda values: COMPARE[sign](values[:, j], value) & ~np.isnan(values[:, j])


def _value(column: Column, sign: str, wanted: str, text: str) -> float:
    """What the cells are compared with."""
    if column.levels:
        if sign not in ("=", "!="):
            raise UserError(f"--where {text}: {column.name!r} holds categories, which are compared with = or !=")
        if wanted not in column.levels:
            raise UserError(f"--where {text}: {wanted!r} was never seen; {nearest(wanted, column.levels)}")
        return float(column.levels.index(wanted))
    if column.kind == "date":
        value = float(seconds([wanted], column.format or "%Y-%m-%d")[0])
        if np.isnan(value):
            raise UserError(f"--where {text}: {wanted!r} is not a date as in the table ({column.format})")
        return value
    try:
        return float(wanted)
    except ValueError:
        raise UserError(f"--where {text}: {column.name!r} holds numbers, and {wanted!r} is none") from None
