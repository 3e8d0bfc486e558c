"""Closed tables of named choices: look a name up, and suggest the nearest one for a wrong name."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from sfumato.errors import UserError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """The hint for a wrong name in an error: "did you mean 'flow'? (one of: cosine, flow)"."""
    names = sorted(names)
    matches = get_close_matches(name, names, n=1, cutoff=0.4)
    choices = f"one of: {', '.join(names) or 'none'}"
    return f"did you mean {matches[0]!r}? ({choices})" if matches else choices


def choose(table: Mapping[str, T], what: str, name: str) -> T:
    """Look up a name in a closed table.

    Args:
        table: The choices by name.
        what: What the table holds, for the error text.
        name: The name to look up.

    Raises:
        UserError: The name is not in the table; the nearest one is suggested.
    """
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: {nearest(name, table)}")
    return table[name]


def build(table: Mapping[str, Callable[..., T]], what: str, name: str, settings: Mapping[str, object]) -> T:
    """Call the constructor of this name with the settings as arguments.

    Args:
        table: Constructors by name.
        what: What the table holds, for the error text.
        name: The name to look up.
        settings: Arguments by name.

    Raises:
        UserError: The name or a setting is unknown; the nearest one is suggested.
    """
    constructor = choose(table, what, name)
    parameters = inspect.signature(constructor).parameters
    for key in settings:
        if key not in parameters:
            raise UserError(f"unknown setting {key!r} of {what} {name!r}: {nearest(key, parameters)}")
    return constructor(**settings)
