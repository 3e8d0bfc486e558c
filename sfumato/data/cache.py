"""Worth keeping between runs: decoded pixels, encoded latents. Every write is atomic; a damaged file is no file."""

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

from ..errors import UserError

IN_MEMORY = 2 * 2**30  # bytes of pixels held in memory; more are mapped from a file
UNUSED = 30 * 24 * 3600.0  # seconds after which what was not used is forgotten


def cache_root() -> Path:
    """The user's cache folder: $SFUMATO_CACHE, else ~/.cache/sfumato."""
    return Path(os.environ.get("SFUMATO_CACHE") or Path.home() / ".cache" / "sfumato")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and goes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """sha256 of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def scratch() -> Path:
    """Where large temporary files go: $TMPDIR, else the user's cache, as the usual folder is often held in memory."""
    given = os.environ.get("TMPDIR")
    folder = Path(given) if given else cache_root() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def allocate(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in memory, or mapped from a nameless temporary file when it is over 2 GiB."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=scratch()) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told here, not by a bus error later
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        place = os.environ.get("TMPDIR") or cache_root()
        room = f"{size / 2**30:.1f} GiB of data that do not fit into memory"
        raise UserError(f"{place}: no room for {room} ({error}); free some or set TMPDIR", code=1) from error


def allocate_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, in memory or mapped as by `allocate`."""
    raw = allocate((math.prod(shape) * dtype.itemsize,), np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def load_array(path: Path) -> NDArray[Any]:
    """What an .npy file holds, in memory or, over 2 GiB, mapped from the file to be read only."""
    large = path.stat().st_size > IN_MEMORY
    return np.load(path, mmap_mode="r" if large else None, allow_pickle=False)


def used(path: Path) -> None:
    """Note that a file of the cache is still of use."""
    with suppress(OSError):  # a cache that cannot be written is no error
        os.utime(path)


def forget(folder: Path) -> None:
    """Remove the files of a part of the cache that nothing has used for a month."""
    for path in folder.iterdir():
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - UNUSED:
                path.unlink()


def save_pixels(key: str, pixels: NDArray[Any], mode: str) -> None:
    """Keep decoded pixels for the next run; a cache that cannot be written is no error."""
    path = cache_root() / "decoded" / f"{key}.{mode.replace(';', '_')}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 3 * pixels.nbytes:
            return
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, pixels, allow_pickle=False)
        forget(path.parent)
    except OSError:
        return


def load_pixels(key: str) -> tuple[NDArray[Any], str] | None:
    """Pixels and mode kept under `key`, or None."""
    for path in (cache_root() / "decoded").glob(f"{key}.*.npy"):
        try:
            pixels = load_array(path)
        except (OSError, ValueError, EOFError):
            continue
        used(path)
        return pixels, path.name.split(".")[1].replace("_", ";")
    return None


def save_listing(stamp: str, place: Mapping[str, int]) -> None:
    """Keep where each file lies in an archive; a cache that cannot be written is no error."""
    try:
        with atomic(cache_root() / "listing" / f"{stamp}.json") as temporary:
            temporary.write_text(json.dumps(place), encoding="utf-8")
    except OSError:
        return


def load_listing(stamp: str) -> dict[str, int] | None:
    """What `save_listing` kept, or None."""
    try:
        return json.loads((cache_root() / "listing" / f"{stamp}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def latent_key(fingerprint: str, codec_hash: str, settings: Mapping[str, object]) -> str:
    """Name of the latents of one data set under one codec and one way of encoding."""
    return key_of("latents", fingerprint, codec_hash, settings)


@dataclass(frozen=True)
class LatentCache:
    """Encoded tensors on disk, one safetensors file per key (see `latent_key`); dtypes are preserved.

    What it gives is in memory or mapped as by `allocate`, and may be written to.

    Args:
        folder: Where the files lie.
        key: Which one.
    """

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        """The file of this key."""
        return Path(self.folder) / f"{self.key}.safetensors"

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors`, in place of what was there."""
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic(self.path) as temporary:
            save_file(ready, temporary, metadata={"key": self.key, "sha256": _checksum(ready)})

    def get(self) -> dict[str, Tensor] | None:
        """What was kept, or None when there is nothing or it is damaged."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: _copied(file.get_tensor(name)) for name in file.keys()}
        except (OSError, SafetensorError):
            return None
        intact = metadata.get("key") == self.key and metadata.get("sha256") == _checksum(tensors)
        used(self.path)
        return tensors if intact else None

    def compute(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What was kept, else what `make` returns, kept for the next time."""
        tensors = self.get()
        if tensors is None:
            tensors = dict(make())
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
