"""Conditions on rows, as people type them: `income=>50K`, `age>=30`, `since<2020-01-01`."""

import operator
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..choice import nearest
from ..errors import UserError
from .columns import MARKERS, Column, Values, modelled, seconds

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
    return lambda values: np.logical_and.reduce([test(values) for test in tests])


def _test(columns: Sequence[Column], text: str) -> Accepts:
    match = CONDITION.fullmatch(text)
    if match is None:
        raise UserError(f"--where {text}: write COLUMN=VALUE, or another of {' '.join(COMPARE)}")
    name, sign, wanted = match.groups()
    names = [column.name for column in columns]
    if name not in names:
        raise UserError(f"--where {text}: no column {name!r}; {nearest(name, names)}")
    j, compare = names.index(name), COMPARE[sign]
    if sign in ("=", "!=") and wanted.lower() in MARKERS and wanted not in columns[j].levels:
        return lambda values: np.isnan(values[:, j]) == (sign == "=")
    value = _value(columns[j], sign, wanted, text)
    return lambda values: compare(values[:, j], value) & ~np.isnan(values[:, j])


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
