"""From files to batches, and from samples to files."""

from .base import Data, split
from .builtin import BUILTINS, read_builtin
from .cache import LatentCache, cache_root, latent_key
from .images import read_images, read_source
from .write import check_images_target, check_writable, replaced_folder, sample_sheet, write_images

__all__ = [
    "BUILTINS",
    "Data",
    "LatentCache",
    "cache_root",
    "check_images_target",
    "check_writable",
    "latent_key",
    "read_builtin",
    "read_images",
    "read_source",
    "replaced_folder",
    "sample_sheet",
    "split",
    "write_images",
]
