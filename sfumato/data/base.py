"""Data in memory (or mapped from disk), served as batches; and its deterministic split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..types import UNKNOWN, Batch

CHANNELS = {"L": 1, "I;16": 1, "RGB": 3, "RGBA": 4}
Index = Sequence[int] | NDArray[np.integer] | Tensor


@dataclass(eq=False)
class Data:
    """Images of one size and mode, kept as the integers they are.

    Args:
        store: All pixels (M, H, W, C), uint8, or uint16 for mode "I;16"; shared between subsets.
        mode: "L", "RGB", "RGBA" or "I;16".
        rows: Which rows of `store` are the items (N,); default all of them.
        labels: Class numbers (N,) int64, `UNKNOWN` where an item has none; or None.
        label_names: Name of each class number.
        captions: One text per item, or None.
        names: File name (or other origin) per item, or None.
        notes: Lines worth telling the user about how the data were read.
    """

    fewest_held: ClassVar[int] = 1

    store: NDArray[np.uint8] | NDArray[np.uint16]
    mode: str
    rows: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None
    label_names: list[str] = field(default_factory=list)
    captions: list[str] | None = None
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.store.ndim == 4 and self.store.shape[-1] == CHANNELS[self.mode], (self.store.shape, self.mode)
        assert self.store.dtype == (np.uint16 if self.mode == "I;16" else np.uint8), (self.store.dtype, self.mode)
        for column in (self.labels, self.captions, self.names):
            assert column is None or len(column) == len(self)

    def __len__(self) -> int:
        return len(self.store) if self.rows is None else len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one item."""
        height, width, channels = self.store.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels, or with one only."""
        return len(self.label_names) if self.labels is not None and len(self.label_names) > 1 else 0

    @property
    def labelled(self) -> bool:
        """Whether some items have a label."""
        return self.labels is not None and bool((self.labels != UNKNOWN).any())

    @property
    def pixels(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The integers (N, H, W, C); a copy when this is a subset."""
        return self.store if self.rows is None else self.store[self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content: pixels, mode, labels, captions (not file names or dates)."""
        digest = hashlib.sha256(repr((self.mode, self.store.shape, self.label_names)).encode())
        for start in range(0, len(self.store), 4096):
            digest.update(np.ascontiguousarray(self.store[start : start + 4096]).data)
        for column in (self.rows, self.labels):
            digest.update(b"-" if column is None else np.ascontiguousarray(column).data)
        for caption in self.captions or ():
            digest.update(caption.encode() + b"\0")
        return digest.hexdigest()

    def batch(self, index: Index) -> Batch:
        """The items `index` (B,) as float32 (B, C, H, W) in [-1, 1], channels last in memory.

        x = pixel / (levels / 2) - 1 with levels 255, or 65535 for 16-bit images: exact at both ends.
        """
        where = np.asarray(index, dtype=np.int64).reshape(-1)
        taken = self.store.take(where if self.rows is None else self.rows[where], axis=0)
        half = 32767.5 if self.mode == "I;16" else 127.5
        data = torch.from_numpy(taken).permute(0, 3, 1, 2).to(torch.float32).div_(half).sub_(1.0)  # (B, C, H, W)
        label = None if self.labels is None else torch.from_numpy(self.labels[where])
        text = None if self.captions is None else [self.captions[i] for i in where]
        return Batch(data, torch.from_numpy(where), label, text)

    def described(self) -> list[str]:
        """What there is to say of what was read: nothing that is not plain to see."""
        return []

    @property
    def origin(self) -> str:
        """What the choice of held-out items hangs on: the content."""
        return self.fingerprint

    def subset(self, index: Index) -> "Data":
        """The items `index` (B,) as Data of their own; the pixels are shared, not copied."""
        where = np.asarray(index, dtype=np.int64).reshape(-1)
        part = Data(
            self.store,
            self.mode,
            where if self.rows is None else self.rows[where],
            None if self.labels is None else self.labels[where],
            self.label_names,
            None if self.captions is None else [self.captions[i] for i in where],
            None if self.names is None else [self.names[i] for i in where],
            self.notes,
        )
        # The parent's hash and the rows say it all: the shared pixels need not be read again.
        part.__dict__["fingerprint"] = hashlib.sha256(self.fingerprint.encode() + where.tobytes()).hexdigest()
        return part


class Joined:
    """Several sets of images of one shape as one; the labels of those that have none are `UNKNOWN`.

    Args:
        parts: The sets, whose items follow one another.
    """

    def __init__(self, parts: Sequence[Data]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        unsaid = [np.full(len(part), UNKNOWN) if part.labels is None else part.labels for part in parts]
        self.numbers = np.concatenate(unsaid)
        self.labels: NDArray[np.int64] | None = self.numbers

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """sha256 of the parts' fingerprints and the labels."""
        said = "".join(part.fingerprint for part in self.parts).encode() + self.numbers.tobytes()
        return hashlib.sha256(said).hexdigest()

    def batch(self, index: Index) -> Batch:
        """The items `index` (B,), as `Data.batch` gives them."""
        where = np.asarray(index, dtype=np.int64).reshape(-1)
        owner = np.searchsorted(self.starts, where, "right") - 1
        data = torch.empty(len(where), *self.parts[0].shape).contiguous(memory_format=torch.channels_last)
        for k in np.unique(owner):
            mine = owner == k
            data[torch.from_numpy(mine)] = self.parts[k].batch(where[mine] - self.starts[k]).data
        return Batch(data, torch.from_numpy(where), torch.from_numpy(self.numbers[where]))


Parts = tuple[Data, Data | None]  # to train on, and held out by the source itself if it does


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A shuffle of range(count) from integer arithmetic alone (splitmix64), the same under every library version."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed % 2**64) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable").astype(np.int64)


def _shares(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """`total` dealt in proportion to `sizes` by largest remainder, leaving one of each behind."""
    exact = sizes * (total / sizes.sum())
    share = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    order = np.argsort(share - exact, kind="stable")
    share[order[share[order] < sizes[order] - 1][: total - share.sum()]] += 1
    return share


class Splittable(Protocol):
    """What a split asks of a data set.

    Attributes:
        fewest_held: Items that are held out even where the share is less, up to a quarter of all.
        labels: Class numbers (N,), or None.
        origin: What the choice hangs on.
    """

    fewest_held: ClassVar[int]
    labels: NDArray[np.int64] | None

    @property
    def origin(self) -> str: ...

    def __len__(self) -> int: ...

    def subset(self, index: Index, /) -> Self: ...


S = TypeVar("S", bound=Splittable)


def split(data: S, fraction: float = 0.1, cap: int = 5000) -> tuple[S, S]:
    """Training and held-out part: deterministic from the content, in proportion by class, at least one held out.

    Args:
        data: At least two items.
        fraction: Share held out.
        cap: Most items held out.
    """
    assert len(data) >= 2, "one item cannot be split"
    order = permutation(len(data), int(data.origin[:16], 16))
    count = max(1, round(len(data) * fraction), min(data.fewest_held, len(data) // 4))
    count = min(count, cap, len(data) - 1)
    held = order[:count]
    if data.labels is not None:
        sizes = np.unique(data.labels, return_counts=True)[1]
        shares = _shares(sizes, count)
        grouped = order[np.argsort(data.labels[order], kind="stable")]  # class after class, each in its order
        rank = np.arange(len(data)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        held = grouped[rank < np.repeat(shares, sizes)] if shares.sum() else held
    kept = np.ones(len(data), dtype=bool)
    kept[held] = False
    return data.subset(np.flatnonzero(kept)), data.subset(np.flatnonzero(~kept))
