"""Types shared by all layers."""

# torch's own annotation of `tolist` is incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, overload

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

Progress = Callable[[str, int, int], None]  # (stage, steps done, total steps)
UNKNOWN = -1  # class number of an unlabelled item
RawValue = Tensor | Sequence[str | None]  # one condition of a batch


@dataclass(frozen=True)
class Raw:
    """What is known of a batch of B items: named conditions, before a `Conditioner` embeds them.

    A label is class numbers (B,) int64, `UNKNOWN` where an item has none; a number is (B,) float32, NaN where unknown;
    a text is B strings, None where unknown. A condition that is not named is unknown for all items.

    Args:
        values: The conditions by name.
    """

    values: Mapping[str, RawValue] = field(default_factory=dict[str, RawValue])

    def __bool__(self) -> bool:
        return bool(self.values)

    def select(self, index: Tensor | Sequence[int]) -> "Raw":
        """The conditions of the items `index` (B,)."""
        where = _numbers(index)
        return Raw({name: _select(value, where) for name, value in self.values.items()})

    def only(self, names: Iterable[str]) -> "Raw":
        """The conditions with these names."""
        return Raw({name: self.values[name] for name in names if name in self.values})

    def drop(self, dropped: Mapping[str, Tensor]) -> "Raw":
        """The conditions, unknown for the items (B,) that are marked under their name."""
        return Raw({name: _drop(value, dropped[name]) for name, value in self.values.items()})

    @staticmethod
    def concat(parts: Sequence["Raw"]) -> "Raw":
        """The conditions of all parts, which name the same ones, in order."""
        return Raw({name: _concat([part.values[name] for part in parts]) for name in parts[0].values})

    def with_value(self, name: str, value: RawValue) -> "Raw":
        """The same conditions, one of them added or replaced."""
        return Raw({**self.values, name: value})


def _numbers(index: Tensor | Sequence[int]) -> Tensor:
    """Numbers of items (B,) from such numbers or from a boolean mask."""
    where = torch.as_tensor(index)
    return where.nonzero().flatten() if where.dtype == torch.bool else where.long()


def _select(value: RawValue, index: Tensor) -> RawValue:
    return value[index] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]


def _concat(parts: Sequence[RawValue]) -> RawValue:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if tensors else [text for part in parts for text in part]  # type: ignore[misc]


def _drop(value: RawValue, dropped: Tensor) -> RawValue:
    if isinstance(value, Tensor):
        return value.masked_fill(dropped, math.nan if value.is_floating_point() else UNKNOWN)
    return [None if drop else text for text, drop in zip(value, dropped.tolist(), strict=True)]


@dataclass
class Batch:
    """A batch of items and what is known of them.

    Args:
        data: Items (B, ...); items of several lengths are padded along their first axis, (B, L, ...).
        index: Index in the data set (B,).
        raw: The conditions.
        mask: (B, L), true where a padded item has data; None if no item is padded.
    """

    data: Tensor
    index: Tensor
    raw: Raw = field(default_factory=Raw)
    mask: Tensor | None = None


@dataclass(frozen=True)
class Latent:
    """Latents of zero mean and unit variance: vectors (B, D), grids (B, C, *grid), or tokens (B, N, D) with a mask.

    Only tokens can have a mask (B, N), true where an item has a token; it may have none at other positions, whose
    values are zero.
    """

    z: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: slice | Tensor) -> "Latent":
        return Latent(self.z[index], None if self.mask is None else self.mask[index])

    def to(self, device: str | torch.device) -> "Latent":
        """The latents on a device."""
        return Latent(self.z.to(device), None if self.mask is None else self.mask.to(device))

    @staticmethod
    def concat(parts: Sequence["Latent"]) -> "Latent":
        """The latents of all parts, in order; tokens are padded to the longest."""
        if all(part.mask is None for part in parts):
            return Latent(torch.cat([part.z for part in parts]))
        longest = max(part.z.shape[1] for part in parts)
        masks = [
            part.z.new_ones(part.z.shape[:2], dtype=torch.bool) if part.mask is None else part.mask for part in parts
        ]
        z = torch.cat([pad(part.z, (0, 0, 0, longest - part.z.shape[1])) for part in parts])
        return Latent(z, torch.cat([pad(mask, (0, longest - mask.shape[1])) for mask in masks]))


class Items(Sequence[Tensor]):
    """Items at a modality's edge: a tensor (N, ...) if all have one shape, else a list of tensors (L_i, ...)."""

    def __init__(self, data: Tensor | Iterable[Tensor]) -> None:
        self.data: Tensor | list[Tensor] = data if isinstance(data, Tensor) else list(data)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.data)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...
    def __getitem__(self, index: int | slice) -> "Tensor | Items":
        return self.data[index] if isinstance(index, int) else Items(self.data[index])

    def select(self, index: Tensor | Sequence[int]) -> "Items":
        """The items `index` (B,), numbers or a boolean mask."""
        where = _numbers(index)
        return Items(self.data[where] if isinstance(self.data, Tensor) else [self.data[i] for i in where.tolist()])

    def stack(self) -> Tensor:
        """All items as one tensor (N, ...); they must have one shape."""
        return self.data if isinstance(self.data, Tensor) else torch.stack(self.data)

    def pad(self) -> tuple[Tensor, Tensor | None]:
        """All items as one tensor, padded along their first axis, and the mask (N, L); None if they are one tensor."""
        if isinstance(self.data, Tensor):
            return self.data, None
        lengths = torch.tensor([len(item) for item in self.data])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return pad_sequence(self.data, batch_first=True), mask

    @classmethod
    def unpad(cls, data: Tensor, mask: Tensor | None) -> Self:
        """The items of a padded tensor (N, L, ...) with its mask (N, L)."""
        return cls(data) if mask is None else cls([x[:n] for x, n in zip(data, mask.sum(1).tolist(), strict=True)])

    @classmethod
    def concat(cls, parts: Sequence["Items"]) -> Self:
        """The items of all parts, in order."""
        tensors = [part.data for part in parts if isinstance(part.data, Tensor)]
        return cls(torch.cat(tensors) if len(tensors) == len(parts) else [item for part in parts for item in part])


@dataclass(frozen=True)
class CategoricalLayout:
    """Positions of a latent (B, D) that encode categories: z = (e - p) / s, with e one-hot in each group.

    Args:
        start: First categorical position; all later ones are categorical too.
        widths: Number of levels, and so of positions, of each group.
        mean: p (D - start,), the frequency of each level.
        std: s (D - start,), equal within a group.
    """

    start: int
    widths: tuple[int, ...]
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Cond:
    """The network's condition: a vector (B, D), tokens (B, M, D) with their mask (B, M), channels to concatenate."""

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None


def batch_limit(shape: Sequence[int], max_items: int, max_numbers: int = 2**24) -> int:
    """Batch size for items of this shape: `max_items`, or fewer so that a batch has at most `max_numbers` elements."""
    return max(1, min(max_items, max_numbers // max(1, math.prod(shape))))
