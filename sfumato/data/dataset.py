"""The protocol of a data set: items in memory or mapped from disk, served as batches; and its deterministic split."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from sfumato.data.conditions import LABEL, Index, Known, Labels, Texts, primary_label
from sfumato.types import UNKNOWN, Batch, Raw


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A shuffle of range(count) from integer arithmetic alone (splitmix64), the same under every library version."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed % 2**64) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable").astype(np.int64)


def _apportion(total: int, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seats (K,) of groups of these sizes (K,), `total` in all, by largest remainder; each group keeps one item."""
    exact = sizes * (total / sizes.sum())
    seats = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    order = np.argsort(seats - exact, kind="stable")
    seats[order[seats[order] < sizes[order] - 1][: total - seats.sum()]] += 1
    return seats


class Dataset(Protocol):
    """Items, of one shape or of several lengths, served as batches, with their conditions and file names.

    Attributes:
        min_held_out: Minimum number of held-out items if the requested share is smaller; at most a quarter of all.
        conditions: What is known of the items, by name: labels, numbers and texts, of N items each. Training embeds
            them all. The primary label is the one named `label`, else the first; tasks balance and evaluate it.
        labels: Class numbers (N,) int64 of the primary label, `UNKNOWN` where an item has none; or None.
        label_names: Name of each of its classes.
        captions: A text per item, None where it is unknown; or None.
        names: File name (or other origin) per item, or None.
        notes: Messages to the user about how the data were read.
    """

    min_held_out: ClassVar[int]

    @property
    def conditions(self) -> Mapping[str, Known]: ...

    @property
    def labels(self) -> NDArray[np.int64] | None: ...

    @property
    def label_names(self) -> Sequence[str]: ...

    @property
    def captions(self) -> Sequence[str | None] | None: ...

    @property
    def names(self) -> Sequence[str] | None: ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item; of the longest, if they have several lengths."""
        ...

    @property
    def spec(self) -> Any:
        """What the numbers of an item mean, as a JSON value."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes of the primary label; 0 without labels, or with a single class."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether some items have a label."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 of the content; it does not depend on the path."""
        ...

    @property
    def split_key(self) -> str:
        """At least 16 hexadecimal digits, on which the choice of held-out items depends."""
        ...

    def __len__(self) -> int: ...

    def batch(self, index: Index, /) -> Batch:
        """The items `index` (B,)."""
        ...

    def subset(self, index: Index, /) -> Self:
        """The items `index` (B,) as a data set; it shares their memory."""
        ...

    def relabel(self, labels: NDArray[np.int64] | None, label_names: list[str], notes: list[str]) -> Self:
        """The same items with other values (N,) of the primary label, or without any label, and other notes."""
        ...

    def describe(self) -> list[str]:
        """What was read, as lines for the user."""
        ...


class Fingerprinted(ABC):
    """A data set whose content is hashed once, when its fingerprint is first asked for."""

    _fingerprint: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 of the content."""
        if not self._fingerprint:
            self._fingerprint = self._hash()
        return self._fingerprint

    @abstractmethod
    def _hash(self) -> str:
        """sha256 of the content, computed."""

    def _inherit_fingerprint(self, parent: "Fingerprinted", index: NDArray[np.int64]) -> None:
        """Make the fingerprint of a subset: the parent's and the positions (B,), so that no item is read again."""
        self._fingerprint = hashlib.sha256(parent.fingerprint.encode() + index.tobytes()).hexdigest()


@dataclass(eq=False, kw_only=True)
class Conditioned:
    """A data set whose items have conditions and names; labels and captions are among the conditions.

    Args:
        conditions: What is known of the items, by name.
        names: File name (or other origin) per item, or None.
        notes: What the user should know about how the data were read.
    """

    conditions: dict[str, Known] = field(default_factory=dict[str, Known])
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list[str])

    @property
    def _primary(self) -> Labels | None:
        name = primary_label(self.conditions)
        known = None if name is None else self.conditions[name]
        return known if isinstance(known, Labels) else None

    @property
    def _captions(self) -> Texts | None:
        return next((known for known in self.conditions.values() if isinstance(known, Texts)), None)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,) of the primary label; None without labels."""
        return None if self._primary is None else self._primary.numbers

    @property
    def label_names(self) -> Sequence[str]:
        """Name of each class of the primary label."""
        return [] if self._primary is None else self._primary.names

    @property
    def classes(self) -> int:
        """Number of classes of the primary label; 0 without labels, or with one class only."""
        return len(self.label_names) if len(self.label_names) > 1 else 0

    @property
    def labelled(self) -> bool:
        """Whether some items have a label."""
        return self.labels is not None and bool((self.labels != UNKNOWN).any())

    @property
    def captions(self) -> Sequence[str | None] | None:
        """The first texts among the conditions; None without texts."""
        return None if self._captions is None else self._captions.texts

    @property
    def further_conditions(self) -> dict[str, Known]:
        """All conditions but the primary label and the captions."""
        return {n: known for n, known in self.conditions.items() if known not in (self._primary, self._captions)}

    def raw(self, index: Index) -> Raw:
        """The conditions of the items `index` (B,)."""
        return Raw({name: known.raw(index) for name, known in self.conditions.items()})

    def relabel(self, labels: NDArray[np.int64] | None, label_names: list[str], notes: list[str]) -> Self:
        """The same items with other values (N,) of the primary label, or without any label, and other notes."""
        if labels is None:
            kept = {name: known for name, known in self.conditions.items() if not isinstance(known, Labels)}
            return replace(self, conditions=kept, notes=notes)
        name = primary_label(self.conditions) or LABEL
        return replace(self, conditions={**self.conditions, name: Labels(labels, label_names)}, notes=notes)

    def describe(self) -> list[str]:
        """The conditions and their kinds in one line, if there are several."""
        found = [f"{name} ({known.describe()})" for name, known in self.conditions.items()]
        return [f"conditions: {', '.join(found)}"] if len(found) > 1 else []


class Unlabelled:
    """A data set whose items have no conditions and no names."""

    conditions: Mapping[str, Known] = MappingProxyType({})
    labels: None = None
    label_names: Sequence[str] = ()
    captions: None = None
    names: None = None
    classes: int = 0
    labelled: bool = False

    def relabel(self, labels: NDArray[np.int64] | None, label_names: list[str], notes: list[str]) -> Self:
        assert labels is None, "this data set has no labels"
        return self


DatasetT = TypeVar("DatasetT", bound=Dataset)


def partly_labelled(labels: NDArray[np.int64] | None) -> bool:
    """Whether some of the labels (N,) are `UNKNOWN` and others are not."""
    return labels is not None and bool((labels == UNKNOWN).any()) and bool((labels != UNKNOWN).any())


def split(data: DatasetT, fraction: float = 0.1, cap: int = 5000) -> tuple[DatasetT, DatasetT]:
    """Training and held-out part: a deterministic function of the content, stratified by the primary label.

    Args:
        data: At least two items.
        fraction: Share of the items to hold out; at least one is.
        cap: Maximum number of held-out items.
    """
    assert len(data) >= 2, "one item cannot be split"
    order = permutation(len(data), int(data.split_key[:16], 16))
    count = max(1, round(len(data) * fraction), min(data.min_held_out, len(data) // 4))
    count = min(count, cap, len(data) - 1)
    held = order[:count]
    labels = data.labels
    if labels is not None:
        sizes = np.unique(labels, return_counts=True)[1]
        seats = _apportion(count, sizes)
        grouped = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within each
        rank = np.arange(len(data)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        held = grouped[rank < np.repeat(seats, sizes)] if seats.sum() else held
    kept = np.ones(len(data), dtype=bool)
    kept[held] = False
    return data.subset(np.flatnonzero(kept)), data.subset(np.flatnonzero(~kept))
