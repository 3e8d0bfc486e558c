"""The cache on disk: decoded arrays, encoded latents, archive listings. Damaged files are ignored."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import UserError

IN_MEMORY = 2 * 2**30  # bytes of an array held in memory; a larger one is mapped from a file
EXPIRY_SECONDS = 30 * 24 * 3600.0  # seconds since its last use after which a cached file is removed


def cache_root() -> Path:
    """The user's cache folder: $SFUMATO_CACHE, else ~/.cache/sfumato."""
    return Path(os.environ.get("SFUMATO_CACHE") or Path.home() / ".cache" / "sfumato")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to it when the block succeeds, removed when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """sha256 of parts that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def scratch_folder() -> Path:
    """Folder of large temporary files: $TMPDIR, else in the user's cache, because /tmp is often held in memory."""
    given = os.environ.get("TMPDIR")
    folder = Path(given) if given else cache_root() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def allocate(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A new array in memory; over 2 GiB, mapped from an unnamed temporary file.

    Raises:
        UserError: The disk has no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=scratch_folder()) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk fails here, not with a bus error later
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        folder = os.environ.get("TMPDIR") or cache_root()
        data = f"{size / 2**30:.1f} GiB of data that do not fit into memory"
        raise UserError(f"{folder}: no room for {data} ({error}); free some or set TMPDIR", code=1) from error


def allocate_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new CPU tensor, in memory or mapped as by `allocate`."""
    raw = allocate((math.prod(shape) * dtype.itemsize,), np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def load_array(path: Path) -> NDArray[Any]:
    """The array of an .npy file, in memory or, over 2 GiB, mapped from the file read-only."""
    large = path.stat().st_size > IN_MEMORY
    return np.load(path, mmap_mode="r" if large else None, allow_pickle=False)


def touch(path: Path) -> None:
    """Mark a cached file as used now."""
    with suppress(OSError):  # a read-only cache is no error
        os.utime(path)


def expire(folder: Path) -> None:
    """Remove the files of a cache folder that were last used over `EXPIRY_SECONDS` ago."""
    for path in folder.iterdir():
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - EXPIRY_SECONDS:
                path.unlink()


def save_decoded(key: str, array: NDArray[Any], mode: str) -> None:
    """Cache a decoded array and its mode; a cache that cannot be written is no error."""
    path = cache_root() / "decoded" / f"{key}.{mode.replace(';', '_')}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 3 * array.nbytes:
            return
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        expire(path.parent)
    except OSError:
        return


def load_decoded(key: str) -> tuple[NDArray[Any], str] | None:
    """The array and mode cached under `key`; None without one."""
    for path in (cache_root() / "decoded").glob(f"{key}.*.npy"):
        try:
            array = load_array(path)
        except (OSError, ValueError, EOFError):
            continue
        touch(path)
        return array, path.name.split(".")[1].replace("_", ";")
    return None


def save_listing(stamp: str, offsets: Mapping[str, int]) -> None:
    """Cache the offset of each file in an archive; a cache that cannot be written is no error."""
    try:
        with atomic(cache_root() / "listing" / f"{stamp}.json") as temporary:
            temporary.write_text(json.dumps(offsets), encoding="utf-8")
    except OSError:
        return


def load_listing(stamp: str) -> dict[str, int] | None:
    """The offsets that `save_listing` cached; None without them."""
    try:
        return json.loads((cache_root() / "listing" / f"{stamp}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def latent_key(fingerprint: str, codec_hash: str, settings: Mapping[str, object]) -> str:
    """Key of the latents of one data set under one codec and the settings of encoding."""
    return key_of("latents", fingerprint, codec_hash, settings)


@dataclass(frozen=True)
class TensorCache:
    """Encoded tensors on disk, one safetensors file per key (see `latent_key`); dtypes are preserved.

    Tensors are returned in memory or mapped as by `allocate`, and may be written to.

    Args:
        folder: Folder of the files.
        key: Key of this file.
    """

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        """The file of this key."""
        return Path(self.folder) / f"{self.key}.safetensors"

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Save `tensors`, replacing those saved before."""
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic(self.path) as temporary:
            save_file(ready, temporary, metadata={"key": self.key, "sha256": _checksum(ready)})

    def get(self) -> dict[str, Tensor] | None:
        """The saved tensors; None if there are none or the file is damaged."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: _copied(file.get_tensor(name)) for name in file.keys()}
        except (OSError, SafetensorError):
            return None
        intact = metadata.get("key") == self.key and metadata.get("sha256") == _checksum(tensors)
        touch(self.path)
        return tensors if intact else None

    def compute(self, encode: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The saved tensors, else those that `encode` returns, which are saved."""
        tensors = self.get()
        if tensors is None:
            tensors = dict(encode())
            self.put(tensors)
        return tensors


def _copied(tensor: Tensor) -> Tensor:
    return allocate_tensor(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
