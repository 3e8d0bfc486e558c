"""From files to batches, and from samples to files."""

from .base import Data, split
from .builtin import BUILTINS, read_builtin
from .cache import LatentCache, cache_root, latent_key
from .columns import Column, modelled, on_grid
from .images import read_images, read_source
from .rows import Dialect
from .table import TableData, column_frame, is_table, read_rows, read_table, write_table
from .write import replaced_folder, sample_sheet, write_images

__all__ = [
    "BUILTINS",
    "Column",
    "Data",
    "Dialect",
    "LatentCache",
    "TableData",
    "cache_root",
    "column_frame",
    "is_table",
    "latent_key",
    "modelled",
    "on_grid",
    "read_builtin",
    "read_images",
    "read_rows",
    "read_source",
    "read_table",
    "replaced_folder",
    "sample_sheet",
    "split",
    "write_images",
    "write_table",
]
