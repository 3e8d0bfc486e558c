"""From files to batches, and from samples to files."""

from .animate import animation
from .base import Data, Joined, split
from .builtin import BUILTINS, read_builtin
from .cache import LatentCache, cache_root, latent_key
from .columns import Column, called, modelled, on_grid
from .conditions import condition, equalities, level_of
from .fill import check_fill_target, fill_table
from .histograms import histograms
from .images import read_images, read_source
from .labels import renumbered
from .masks import read_masks
from .rows import Dialect
from .table import TableData, is_table, read_rows, read_table, table_files
from .table_write import check_table_target, column_frame, write_table
from .write import (
    check_file_target,
    check_images_target,
    check_swappable,
    check_writable,
    json_text,
    picture_format,
    replaced_folder,
    sample_sheet,
    save_picture,
    swapped_folder,
    write_images,
)

__all__ = [
    "BUILTINS",
    "Column",
    "Data",
    "Dialect",
    "Joined",
    "LatentCache",
    "TableData",
    "animation",
    "cache_root",
    "called",
    "check_file_target",
    "check_fill_target",
    "check_images_target",
    "check_swappable",
    "check_table_target",
    "check_writable",
    "column_frame",
    "condition",
    "equalities",
    "fill_table",
    "histograms",
    "is_table",
    "json_text",
    "latent_key",
    "level_of",
    "modelled",
    "on_grid",
    "picture_format",
    "read_builtin",
    "read_images",
    "read_masks",
    "read_rows",
    "read_source",
    "read_table",
    "renumbered",
    "replaced_folder",
    "sample_sheet",
    "save_picture",
    "split",
    "swapped_folder",
    "table_files",
    "write_images",
    "write_table",
]
