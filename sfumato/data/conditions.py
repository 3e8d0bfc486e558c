"""What a data set knows of its items: named conditions, each a label, a number or a text per item."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.types import UNKNOWN

Index = Sequence[int] | NDArray[np.integer] | Tensor
LABEL = "label"  # name of the condition if a source has classes without a name
CAPTION = "text"  # name of the condition that captions are
MAX_INTEGER_CLASSES = 20  # distinct integers that are taken for classes; more are numbers
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def positions(index: Index) -> NDArray[np.int64]:
    """An index (B,) as an array."""
    return np.asarray(index, dtype=np.int64).reshape(-1)


@dataclass(frozen=True, eq=False)
class Labels:
    """A class per item.

    Args:
        numbers: Class numbers (N,) int64, `UNKNOWN` where an item has no label.
        names: Name of each class.
    """

    numbers: NDArray[np.int64]
    names: Sequence[str]

    def __post_init__(self) -> None:
        assert self.numbers.ndim == 1 and self.numbers.dtype == np.int64, (self.numbers.shape, self.numbers.dtype)

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def from_values(cls, values: Sequence[object]) -> "Labels":
        """The labels whose names are N values; blank ones are unknown.

        Classes are sorted: by value if all names are integers, else as text.
        """
        texts = [None if is_blank(v) else _class_name(v) for v in values]
        names = sorted({text for text in texts if text is not None})
        if all(re.fullmatch(r"-?\d+", name) for name in names):
            names.sort(key=lambda name: (int(name), name))
        number: dict[str | None, int] = {name: k for k, name in enumerate(names)}
        return cls(np.array([number.get(text, UNKNOWN) for text in texts], np.int64), names)

    def select(self, index: Index) -> "Labels":
        """The labels of the items `index` (B,), with the same classes."""
        return Labels(self.numbers[positions(index)], self.names)

    def raw(self, index: Index) -> Tensor:
        """Class numbers (B,) int64 of the items `index` (B,)."""
        return torch.from_numpy(self.numbers[positions(index)])

    def without_empty_classes(self) -> "Labels":
        """The same labels with the classes that some item has."""
        present = np.unique(self.numbers[self.numbers != UNKNOWN])
        numbers = np.where(self.numbers == UNKNOWN, UNKNOWN, np.searchsorted(present, self.numbers))
        return Labels(numbers, [name for k, name in enumerate(self.names) if k in present])

    def content(self) -> bytes:
        """What a fingerprint depends on."""
        return repr(list(self.names)).encode() + self.numbers.tobytes()

    def describe(self) -> str:
        """What it is, in a few words for the user."""
        return f"{len(self.names)} class{'es' * (len(self.names) != 1)}"


@dataclass(frozen=True, eq=False)
class Numbers:
    """A number per item.

    Args:
        values: (N,) float32, NaN where it is unknown.
    """

    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.values.ndim == 1 and self.values.dtype == np.float32, (self.values.shape, self.values.dtype)

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: Index) -> "Numbers":
        """The numbers of the items `index` (B,)."""
        return Numbers(self.values[positions(index)])

    def raw(self, index: Index) -> Tensor:
        """The numbers (B,) float32 of the items `index` (B,)."""
        return torch.from_numpy(self.values[positions(index)])

    def content(self) -> bytes:
        """What a fingerprint depends on."""
        return self.values.tobytes()

    def describe(self) -> str:
        """What it is, in a few words for the user."""
        known = self.values[~np.isnan(self.values)]
        return f"numbers from {known.min():g} to {known.max():g}" if len(known) else "numbers, all unknown"


@dataclass(frozen=True, eq=False)
class Texts:
    """A text per item.

    Args:
        texts: N texts, None where it is unknown.
    """

    texts: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Index) -> "Texts":
        """The texts of the items `index` (B,)."""
        return Texts(self.raw(index))

    def raw(self, index: Index) -> list[str | None]:
        """The texts of the items `index` (B,)."""
        return [self.texts[i] for i in positions(index)]

    def content(self) -> bytes:
        """What a fingerprint depends on; an empty text counts as unknown."""
        return b"".join((text or "").encode() + b"\0" for text in self.texts)

    def describe(self) -> str:
        """What it is, in a few words for the user."""
        return "texts"


Known = Labels | Numbers | Texts


def is_blank(value: object) -> bool:
    """Whether a value is missing: None, an empty text or NaN."""
    return value is None or value == "" or value != value


def _class_name(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def parse_number(value: object) -> float | None:
    """The number that a value is or spells, NaN for a blank one; None for what is not a finite float32."""
    if is_blank(value):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if abs(number) > MAX_FLOAT32 else number


def look_numeric(values: Iterable[object]) -> bool:
    """Whether values are all numbers or blank, and not just `MAX_INTEGER_CLASSES` distinct integers, or fewer."""
    numbers = {parse_number(value) for value in values if not is_blank(value)}
    known = {number for number in numbers if number is not None and not math.isnan(number)}
    return None not in numbers and (len(known) > MAX_INTEGER_CLASSES or not all(map(float.is_integer, known)))


def primary_label(conditions: Mapping[str, Known]) -> str | None:
    """Name of the label that tasks balance and evaluate: `label` if it is one, else the first; None without labels."""
    names = [name for name, known in conditions.items() if isinstance(known, Labels)]
    return LABEL if LABEL in names else next(iter(names), None)
