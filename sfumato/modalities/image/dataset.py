"""Images in memory, or mapped from disk, served as batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.data.conditions import LABEL, Index, positions
from sfumato.data.dataset import Conditioned, Fingerprinted
from sfumato.types import UNKNOWN, Batch, Raw

CHANNELS = {"L": 1, "I;16": 1, "RGB": 3, "RGBA": 4}  # channels of each supported mode of Pillow
HASH_CHUNK = 4096  # images hashed at a time


@dataclass(eq=False)
class ImageDataset(Conditioned, Fingerprinted):
    """Images of one size and mode, stored as integers, with the conditions and names of `Conditioned`.

    Args:
        store: All pixels (M, H, W, C), uint8, or uint16 for mode "I;16"; shared between subsets.
        mode: "L", "RGB", "RGBA" or "I;16".
        rows: Indices (N,) of the items in `store`; default all.
    """

    min_held_out: ClassVar[int] = 1

    store: NDArray[np.uint8] | NDArray[np.uint16]
    mode: str
    rows: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        assert self.store.ndim == 4 and self.store.shape[-1] == CHANNELS[self.mode], (self.store.shape, self.mode)
        assert self.store.dtype == (np.uint16 if self.mode == "I;16" else np.uint8), (self.store.dtype, self.mode)
        for column in (self.names, *self.conditions.values()):
            assert column is None or len(column) == len(self)

    def __len__(self) -> int:
        return len(self.store) if self.rows is None else len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one item."""
        height, width, channels = self.store.shape[1:]
        return channels, height, width

    @property
    def pixels(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The integers (N, H, W, C); a copy if this is a subset."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def split_key(self) -> str:
        """The fingerprint: the held-out items depend on the content."""
        return self.fingerprint

    @property
    def spec(self) -> str:
        """The mode."""
        return self.mode

    def batch(self, index: Index) -> Batch:
        """The items `index` (B,) as float32 (B, C, H, W) in [-1, 1], channels last in memory.

        x = pixel / (maximum / 2) - 1 with maximum 255, or 65535 for 16-bit images.
        """
        where = positions(index)
        pixels = self.store.take(where if self.rows is None else self.rows[where], axis=0)
        half = 32767.5 if self.mode == "I;16" else 127.5
        data = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(half).sub_(1.0)  # (B, C, H, W)
        return Batch(data, torch.from_numpy(where), self.raw(where))

    def subset(self, index: Index) -> "ImageDataset":
        """The items `index` (B,) as a data set; pixels are shared, not copied."""
        where = positions(index)
        part = replace(
            self,
            rows=where if self.rows is None else self.rows[where],
            conditions={name: known.select(where) for name, known in self.conditions.items()},
            names=None if self.names is None else [self.names[i] for i in where],
        )
        # determined by the parent's hash and the rows, without reading the pixels again
        part._inherit_fingerprint(self, where)
        return part

    def _hash(self) -> str:
        digest = hashlib.sha256(repr((self.mode, self.store.shape, list(self.label_names))).encode())
        for start in range(0, len(self.store), HASH_CHUNK):
            digest.update(np.ascontiguousarray(self.store[start : start + HASH_CHUNK]).data)
        for column in (self.rows, self.labels):
            digest.update(b"-" if column is None else np.ascontiguousarray(column).data)
        if self._captions is not None:
            digest.update(self._captions.content())
        for name, known in self.further_conditions.items():
            digest.update(repr((name, type(known).__name__)).encode() + known.content())
        return digest.hexdigest()


class ConcatDataset:
    """Several image data sets of one shape as one, with the primary label only: `UNKNOWN` where a part has none.

    Args:
        parts: The data sets, in this order.
    """

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        labels = [np.full(len(part), UNKNOWN) if part.labels is None else part.labels for part in parts]
        self.label_numbers = np.concatenate(labels)
        self.labels: NDArray[np.int64] | None = self.label_numbers

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """sha256 of the parts' fingerprints and the labels."""
        content = "".join(part.fingerprint for part in self.parts).encode() + self.label_numbers.tobytes()
        return hashlib.sha256(content).hexdigest()

    def batch(self, index: Index) -> Batch:
        """The items `index` (B,), as `ImageDataset.batch` returns them, with the condition `label`."""
        where = positions(index)
        part = np.searchsorted(self.starts, where, "right") - 1
        data = torch.empty(len(where), *self.parts[0].shape).contiguous(memory_format=torch.channels_last)
        for k in np.unique(part):
            selected = part == k
            data[torch.from_numpy(selected)] = self.parts[k].batch(where[selected] - self.starts[k]).data
        return Batch(data, torch.from_numpy(where), Raw({LABEL: torch.from_numpy(self.label_numbers[where])}))


Parts = tuple[ImageDataset, ImageDataset | None]  # training part, and the source's own held-out part if it has one
