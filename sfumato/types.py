"""Types shared by all layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Progress = Callable[[str, int, int], None]  # (stage, steps done, total steps)
UNKNOWN = -1  # class number of an unlabelled item


@dataclass
class Batch:
    """A batch of items: data (B, ...), index in the data set (B,), and labels and texts if there are any.

    Labels (B,) are class numbers, `UNKNOWN` for an unlabelled item.
    """

    data: Tensor
    index: Tensor
    label: Tensor | None = None
    text: list[str] | None = None


@dataclass
class Latent:
    """Latents of zero mean and unit variance, (B, *latent_shape); `mask` (B, N), true where a padded item has data."""

    z: Tensor
    mask: Tensor | None = None


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


@dataclass
class Cond:
    """The network's condition: a vector (B, D), tokens (B, M, D) with their mask (B, M), channels to concatenate."""

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None


def batch_limit(shape: Sequence[int], max_items: int, max_numbers: int = 2**24) -> int:
    """Batch size for items of this shape: `max_items`, or fewer so that a batch has at most `max_numbers` elements."""
    return max(1, min(max_items, max_numbers // max(1, math.prod(shape))))
