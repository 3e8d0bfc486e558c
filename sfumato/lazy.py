"""Lazy imports: pandas and pyarrow take half a second to import, which images need not wait for.

A module that uses them declares them as follows, with `from __future__ import annotations`, because annotations are
uses too:

    if TYPE_CHECKING:
        import pandas as pd
    else:
        pd = LazyModule("pandas")
"""

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """The module of this name, imported on first access to an attribute.

    Raises:
        ImportError: On an access, if there is no such module.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)
