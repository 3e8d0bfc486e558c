"""The few things every layer hands to the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

UNKNOWN = -1  # class number of an item whose label is not known


@dataclass
class Batch:
    """Items on their way into training: data (B, ...), their index in the data set (B,), and what is known of them.

    Labels are class numbers, `UNKNOWN` where an item has none.
    """

    data: Tensor
    index: Tensor
    label: Tensor | None = None
    text: list[str] | None = None


@dataclass
class Latent:
    """Codes of zero mean and unit variance, (B, *latent_shape); `mask` (B, N) is true where a padded item has data."""

    z: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Corners:
    """Positions of a latent (B, D) that are codes of categories: z = (e - p) / s, e a one among zeros in each group.

    Args:
        start: The first such position; all that follow are.
        widths: Positions of each group, one for each of its levels.
        mean: p (D - start,), the share of each level.
        std: s (D - start,), the same throughout a group.
    """

    start: int
    widths: tuple[int, ...]
    mean: Tensor
    std: Tensor


@dataclass
class Cond:
    """What the network is told: a vector (B, D), tokens (B, M, D) with their mask (B, M), channels to concatenate."""

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def at_once(shape: Sequence[int], most: int, numbers: int = 2**24) -> int:
    """How many items of this shape to handle at a time: `most`, or fewer where those hold more than so many numbers."""
    return max(1, min(most, numbers // max(1, math.prod(shape))))
