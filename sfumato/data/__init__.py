"""From files to batches, and from samples to files."""

from .animate import animation
from .base import Data, split
from .builtin import BUILTINS, read_builtin
from .cache import LatentCache, cache_root, latent_key
from .images import read_images, read_source
from .masks import read_masks
from .write import replaced_folder, sample_sheet, write_images

__all__ = [
    "BUILTINS",
    "Data",
    "LatentCache",
    "animation",
    "cache_root",
    "latent_key",
    "read_builtin",
    "read_images",
    "read_masks",
    "read_source",
    "replaced_folder",
    "sample_sheet",
    "split",
    "write_images",
]
