"""What readers and writers of all modalities share: data sets, splits, files, archives, the cache, output folders."""

from sfumato.data.cache import TensorCache, allocate, allocate_tensor, cache_root, key_of, latent_key
from sfumato.data.dataset import Index, split
from sfumato.data.output import (
    check_file_target,
    check_swappable,
    check_writable,
    json_text,
    picture_format,
    save_picture,
    swapped_folder,
)

__all__ = [
    "Index",
    "TensorCache",
    "allocate",
    "allocate_tensor",
    "cache_root",
    "check_file_target",
    "check_swappable",
    "check_writable",
    "json_text",
    "key_of",
    "latent_key",
    "picture_format",
    "save_picture",
    "split",
    "swapped_folder",
]
