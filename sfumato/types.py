"""The few things every layer hands to the next."""

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

    def part(self, start: int, stop: int) -> "Batch":
        """Items start..stop-1."""
        cut = slice(start, stop)
        label, text = (None if v is None else v[cut] for v in (self.label, self.text))
        return Batch(self.data[cut], self.index[cut], label, text)  # type: ignore[arg-type]


@dataclass
class Latent:
    """Codes of zero mean and unit variance, (B, *latent_shape); `mask` (B, N) is true where a padded item has data."""

    z: Tensor
    mask: Tensor | None = None


@dataclass
class Cond:
    """What the network is told: a vector (B, D), tokens (B, M, D) with their mask (B, M), channels to concatenate."""

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
