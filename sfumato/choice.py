"""Closed tables of named choices: what a name means, and what was probably meant by a wrong one."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from sfumato.errors import UserError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """Words that lead from a wrong name to the right one: "did you mean 'flow'? (one of: cosine, flow)"."""
    names = sorted(names)
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    known = f"one of: {', '.join(names) or 'none'}"
    return f"did you mean {close[0]!r}? ({known})" if close else known


def choose(table: Mapping[str, T], what: str, name: str) -> T:
    """Look up a name in a closed table of `what`.

    Raises:
        UserError: The name is not in the table; the nearest one is suggested.
    """
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: {nearest(name, table)}")
    return table[name]


def build(table: Mapping[str, Callable[..., T]], what: str, name: str, settings: Mapping[str, object]) -> T:
    """Call the constructor named, with settings that its signature knows.

    Raises:
        UserError: The name or a setting is unknown; the nearest one is suggested.
    """
    constructor = choose(table, what, name)
    known = inspect.signature(constructor).parameters
    for key in settings:
        if key not in known:
            raise UserError(f"unknown setting {key!r} of {what} {name!r}: {nearest(key, known)}")
    return constructor(**settings)
