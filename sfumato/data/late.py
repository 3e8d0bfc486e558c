"""Modules that are imported when first used: pandas and pyarrow take half a second, which images need not wait for.

A module that uses them names them so, and has `from __future__ import annotations`, as annotations are uses too:

    if TYPE_CHECKING:
        import pandas as pd
    else:
        pd = Late("pandas")
"""

from importlib import import_module
from types import ModuleType
from typing import Any


class Late(ModuleType):
    """The module of this name, imported when something of it is first asked for.

    Raises:
        ImportError: From that first use on, where there is no such module.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)
