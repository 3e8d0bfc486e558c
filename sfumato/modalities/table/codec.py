"""Codecs of table rows: numbers as normal scores, levels one-hot, with or without a learned latent."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.codecs.base import Codec
from sfumato.codecs.bottleneck import Identity, make_bottleneck
from sfumato.errors import UserError
from sfumato.modalities.table.quantile import QuantileTransform
from sfumato.nn.layers import zero_init
from sfumato.types import CategoricalLayout, Latent

GROUP_STD = 2.0  # total standard deviation of a column's one-hot group in the latent; a number has 1


class LevelGroup(NamedTuple):
    """One-hot encoding of a column.

    The levels are some values, then "another value" (given by the score), then "missing".

    Args:
        column: Index of the column.
        values: Values that are levels, ascending: all of a category, the spikes of a number.
        has_other: Whether there are other values.
        has_missing: Whether cells can be missing.
    """

    column: int
    values: tuple[float, ...]
    has_other: bool
    has_missing: bool

    @property
    def width(self) -> int:
        """Number of levels, one feature each."""
        return len(self.values) + self.has_other + self.has_missing

    def level(self, x: Tensor) -> Tensor:
        """Levels (B,) of cells x (B,); -1 for a missing cell if the column has none."""
        values = torch.tensor(self.values, dtype=x.dtype, device=x.device)
        level = torch.searchsorted(values, x.nan_to_num()).clamp_max(max(0, len(values) - 1))
        if not self.has_other:
            below = (level - 1).clamp_min(0)
            level = torch.where((x - values[below]).abs() < (x - values[level]).abs(), below, level)
        elif len(values):
            level = torch.where(values[level] == x, level, len(values))
        return torch.where(x.isnan(), self.width - 1 if self.has_missing else -1, level)

    def one_hot(self, x: Tensor) -> Tensor:
        """One-hot features (B, width) of cells x (B,); zeros for level -1."""
        return (self.level(x)[:, None] == torch.arange(self.width, device=x.device)).float()

    def nearest(self, f: Tensor, score: Tensor) -> Tensor:
        """Cells (B,) of features or logits f (B, width); the value of the score (B,) at the level "another value"."""
        no_value = [torch.nan] * (self.has_other + self.has_missing)
        values = torch.tensor([*self.values, *no_value], dtype=torch.float64, device=f.device)
        level = f.argmax(1)
        return torch.where((level == len(self.values)) & self.has_other, score, values[level])


def make_group(column: int, config: Mapping[str, Any]) -> LevelGroup | None:
    """The levels of a column; None for numbers without spikes and missing cells."""
    values, has_other, has_missing = config.get("spikes", ()), config.get("other", True), config["missing"]
    if config["levels"]:
        values, has_other = range(config["levels"]), False
    return LevelGroup(column, tuple(map(float, values)), has_other, has_missing) if values or has_missing else None


class Features(nn.Module):
    """Rows (B, D) of numbers, level indices and NaN for missing cells -> features (B, F), and back.

    The features are the normal scores of numbers (0 if the cell's level determines it), then a one-hot group for each
    column with levels: categories, and numbers with spikes or missing cells.

    Args:
        columns: For each of the D columns `levels`, their number (0 for numbers), `missing`, whether cells can be, and
            for numbers `spikes`, the values that are levels, and `other`, whether there are others.
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        groups = [make_group(j, column) for j, column in enumerate(columns)]
        self.count = len(columns)
        self.groups = [group for group in groups if group is not None]
        self.numbers = [j for j, group in enumerate(groups) if group is None or group.has_other]
        self.scores = QuantileTransform(len(self.numbers))

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of features of each group."""
        return tuple(group.width for group in self.groups)

    @property
    def size(self) -> int:
        """Number of features F."""
        return len(self.numbers) + sum(self.widths)

    def split(self, f: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Scores (B, n) and the features of each group."""
        scores, *groups = f.split([len(self.numbers), *self.widths], 1)
        return scores, groups

    def continuous(self, x: Tensor) -> Tensor:
        """The numbers (B, n) of rows x (B, D) that have a score; NaN where the level determines the value."""
        numbers = x.clone()
        for group in self.groups:
            if group.has_other:
                numbers[group.level(x[:, group.column]) != len(group.values), group.column] = torch.nan
        return numbers[:, self.numbers]

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Features (B, F), float32, of rows x (B, D), float64; with random scores if given a CPU generator."""
        one_hot = [group.one_hot(x[:, group.column]) for group in self.groups]
        return torch.cat([self.scores(self.continuous(x), generator), *one_hot], 1)

    def inverse(self, f: Tensor) -> Tensor:
        """Rows (B, D), float64, whose features are nearest to f (B, F)."""
        scores, groups = self.split(f)
        x = f.new_zeros(len(f), self.count, dtype=torch.float64)
        x[:, self.numbers] = self.scores.inverse(scores)
        for group, features in zip(self.groups, groups, strict=True):
            x[:, group.column] = group.nearest(features, x[:, group.column])
        return x

    def distance(self, out: Tensor, f: Tensor) -> Tensor:
        """Distance of a decoder's output from features f, both (B, F): the mean over scores and groups (B,).

        Half the squared error for scores; the cross-entropy for groups, whose outputs are logits.
        """
        (scores, groups), (scores_f, groups_f) = self.split(out), self.split(f)
        terms = [(scores - scores_f).square() / 2]
        terms += [-(b * a.log_softmax(1)).sum(1, keepdim=True) for a, b in zip(groups, groups_f, strict=True)]
        return torch.cat(terms, 1).mean(1)

    def positions(self, column: int) -> list[int]:
        """Indices of a column's features: its score and its levels."""
        indices = [self.numbers.index(column)] if column in self.numbers else []
        start = len(self.numbers)
        for group in self.groups:
            indices += range(start, start + group.width) if group.column == column else ()
            start += group.width
        return indices


class ResidualMLP(nn.Module):
    """A linear map plus a residual MLP that is zero at initialisation: (B, in) -> (B, out).

    Args:
        in_features: Input size.
        out_features: Output size.
        width: Width of the hidden layers.
        depth: Number of residual blocks.
    """

    def __init__(self, in_features: int, out_features: int, width: int, depth: int) -> None:
        super().__init__()
        self.linear, self.enter = nn.Linear(in_features, out_features), nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = zero_init(nn.Linear(width, out_features))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)  # (B, W)
        for block in self.blocks:
            h = h + block(F.silu(F.layer_norm(h, h.shape[-1:])))
        return self.linear(x) + self.leave(F.silu(h))


class TableCodec(Codec):
    """Rows of a table <-> vectors.

    `identity` has no weights: the latent is the whitened features. Numbers are continuous, levels discrete: decoding
    takes the largest of a one-hot group. The other bottlenecks are learned, between an encoder and a decoder MLP.

    Args:
        columns: For each modelled column the fields of `Features`, and the range `low` and `high` of numbers.
        bottleneck: `identity`; or `kl`, `vq`, `fsq`, `none` on a learned vector.
        latent_dim: Length of that vector.
        width: Hidden width of encoder and decoder.
        depth: Residual blocks of each.
        codebook_size: Number of codes of `vq`.
        groups: Codes per row of `vq`.
        levels: Levels per channel of `fsq`.

    References:
        Zhang et al. 2024, Mixed-Type Tabular Data Synthesis with Score-based Diffusion in Latent Space (TabSyn),
        arXiv:2310.09656: diffusion in the latent space of a table's autoencoder.
    """

    prepare_items = 200_000
    differentiable = False
    stochastic = True

    def __init__(
        self,
        columns: Sequence[Mapping[str, Any]],
        *,
        bottleneck: str = "identity",
        latent_dim: int = 32,
        width: int = 512,
        depth: int = 2,
        codebook_size: int = 512,
        groups: int = 1,
        levels: Sequence[int] | None = None,
    ) -> None:
        features = Features(columns)
        count, identity = features.size, bottleneck == "identity"
        options: dict[str, Any] = {"size": codebook_size, "groups": groups} if bottleneck == "vq" else {}
        options |= {"levels": tuple(levels)} if bottleneck == "fsq" and levels else {}
        neck = Identity(count) if identity else make_bottleneck(bottleneck, latent_dim, **options)
        super().__init__((neck.out_channels,))
        self.ranges = [[column.get(end) for column in columns] for end in ("low", "high")]
        self.features, self.bottleneck, self.identity = features, neck, identity
        self.encoder = nn.Identity() if identity else ResidualMLP(count, neck.in_channels, width, depth)
        self.decoder = nn.Identity() if identity else ResidualMLP(neck.out_channels, count, width, depth)

    def prepare(self, x: Tensor) -> None:
        """Fit the quantile transform to rows x (N, D); to a sample of them, with the ranges of all rows."""
        if len(x) >= self.prepare_items:
            extremes = [[math.nan if cell is None else cell for cell in row] for row in self.ranges]
            x = torch.cat([x, x.new_tensor(extremes)])
        self.features.scores.fit(self.features.continuous(x))

    def encode_raw(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raw codes h (B, *latent_shape) of rows x, from the middle score of each value."""
        return self.bottleneck.mode(self.encoder(self.features(x))).float()  # type: ignore[operator]

    def sample_latent(self, x: Tensor, generator: Generator, mask: Tensor | None = None) -> Latent:
        """Latents of rows x with random scores."""
        with torch.no_grad():
            h = self.bottleneck.mode(self.encoder(self.features(x, generator))).float()  # type: ignore[operator]
            return self.whiten(h)

    def forward(
        self, x: Tensor, generator: Generator | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The training path: the decoder's output (B, F), the bottleneck's loss (B,), and its statistics."""
        h, loss, info = self.bottleneck(self.encoder(self.features(x, generator)), generator)
        return self.decoder(h), loss, info

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
        """Distance (B,) of the decoder's output x_hat (B, F) from rows x (B, D); `kind` is for images."""
        return self.features.distance(x_hat.float(), self.features(x))

    def decode(self, latent: Latent) -> Tensor:
        """Rows (B, D), float64, NaN if missing, of latents."""
        h = self.bottleneck.quantize(latent.z * self.latent_std + self.latent_mean)  # type: ignore[operator]
        with torch.autocast(h.device.type, enabled=False):  # in bfloat16 numbers would have a few hundred values
            return self.features.inverse(self.decoder(h))

    @torch.no_grad()
    def learn_statistics(self, h: Tensor | Iterable[Tensor], floor: float = 1e-3) -> None:
        """As in the base class, but a one-hot group of the latent has one standard deviation, `GROUP_STD` in total.

        Whitened one by one, rare or numerous levels would lie far apart: only noise near t = 1 would hide them, and the
        loss would concern them at few times. With twice the deviation of numbers, levels are decided before numbers,
        which then depend on them.
        """
        super().learn_statistics(h, floor)
        if self.identity:
            scores, groups = self.features.split(self.latent_std[None])
            shared = [(group.square().sum().sqrt() / GROUP_STD).expand_as(group) for group in groups]
            self.latent_std.copy_(torch.cat([scores, *shared], 1)[0])

    def unmasked(self, mask: Tensor, present: bool = True) -> Tensor:
        """The positions (B, D) of cells outside a mask (B, columns).

        With `present`, also the positions of the level "missing": it is known to be 0.

        Raises:
            UserError: The latent is learned, so that each position encodes the whole row.
        """
        if not self.identity:
            raise UserError("only a model with codec.bottleneck=identity can impute cells", code=1)
        unmasked = torch.ones(len(mask), self.latent_size, dtype=torch.bool, device=mask.device)
        for column in range(self.features.count):
            unmasked[:, self.features.positions(column)] = ~mask[:, column, None]
        end = len(self.features.numbers)
        for group in self.features.groups:
            end += group.width
            unmasked[:, end - 1] |= group.has_missing and present
        return unmasked

    def categorical_layout(self) -> CategoricalLayout | None:
        """The one-hot groups, if the latent has them."""
        start = len(self.features.numbers)
        if not (self.identity and self.features.groups):
            return None
        return CategoricalLayout(start, self.features.widths, self.latent_mean[start:], self.latent_std[start:])
