"""Codecs for rows of a table: numbers as normal scores, levels as corners, with or without a learned code."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.codecs.base import Codec
from sfumato.codecs.bottleneck import Plain, make_bottleneck
from sfumato.codecs.scores import Scores
from sfumato.errors import UserError
from sfumato.nn.blocks import zero_init
from sfumato.types import Corners, Latent

APART = 2.0  # deviation of a category's levels, all together; that of a number is 1


class Group(NamedTuple):
    """What a column holds, as one of several levels: a one among zeros.

    The levels are certain values, then any other value (whose score says which), then a missing cell.

    Args:
        column: Its number.
        values: The values that are levels, rising: all of a category's; of a number's those that many rows share.
        other: Whether there are other values.
        missing: Whether cells may be missing.
    """

    column: int
    values: tuple[float, ...]
    other: bool
    missing: bool

    @property
    def width(self) -> int:
        """Number of levels, each a feature."""
        return len(self.values) + self.other + self.missing

    def level(self, x: Tensor) -> Tensor:
        """Levels (B,) of cells x (B,); -1 of a missing one where none should be."""
        values = torch.tensor(self.values, dtype=x.dtype, device=x.device)
        level = torch.searchsorted(values, x.nan_to_num()).clamp_max(max(0, len(values) - 1))
        if not self.other:
            before = (level - 1).clamp_min(0)
            level = torch.where((x - values[before]).abs() < (x - values[level]).abs(), before, level)
        elif len(values):
            level = torch.where(values[level] == x, level, len(values))
        return torch.where(x.isnan(), self.width - 1 if self.missing else -1, level)

    def corner(self, x: Tensor) -> Tensor:
        """Features (B, width) of cells x (B,): a one among zeros; only zeros for what is no level."""
        return (self.level(x)[:, None] == torch.arange(self.width, device=x.device)).float()

    def nearest(self, f: Tensor, score: Tensor) -> Tensor:
        """Cells (B,) of features or logits f (B, width); what the score (B,) says where f says another value."""
        rest = [torch.nan] * (self.other + self.missing)
        values = torch.tensor([*self.values, *rest], dtype=torch.float64, device=f.device)
        level = f.argmax(1)
        return torch.where((level == len(self.values)) & self.other, score, values[level])


def group(column: int, facts: Mapping[str, Any]) -> Group | None:
    """The levels of a column; None for numbers that are all different and never missing."""
    values, other = facts.get("spikes", ()), facts.get("other", True)
    if facts["levels"]:
        values, other = range(facts["levels"]), False
    return Group(column, tuple(map(float, values)), other, facts["missing"]) if values or facts["missing"] else None


class Features(nn.Module):
    """Rows (B, D) of numbers, level indices and NaN where missing -> features (B, F), and back.

    First the normal scores of numbers (0 where a cell's level says it all), then the levels of each column that has
    some: categories, and numbers with values that many rows share or with missing cells.

    Args:
        columns: For each of the D columns `levels` (0 for numbers), `missing`, whether cells may be, and of numbers
            `spikes`, the values that are levels, and `other`, whether there are others.
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        found = [group(j, column) for j, column in enumerate(columns)]
        self.count = len(columns)
        self.groups = [levels for levels in found if levels is not None]
        self.numbers = [j for j, levels in enumerate(found) if levels is None or levels.other]
        self.scores = Scores(len(self.numbers))

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each group."""
        return tuple(levels.width for levels in self.groups)

    @property
    def size(self) -> int:
        """Number of features F."""
        return len(self.numbers) + sum(self.widths)

    def split(self, f: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Scores (B, n) and the features of each group."""
        scores, *groups = f.split([len(self.numbers), *self.widths], 1)
        return scores, groups

    def others(self, x: Tensor) -> Tensor:
        """The numbers (B, n) of rows x (B, D) that scores stand for; NaN where a level does."""
        kept = x.clone()
        for levels in self.groups:
            if levels.other:
                kept[levels.level(x[:, levels.column]) != len(levels.values), levels.column] = torch.nan
        return kept[:, self.numbers]

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Features (B, F), float32, of rows x (B, D), float64; scores are drawn from the CPU's generator if given."""
        corners = [levels.corner(x[:, levels.column]) for levels in self.groups]
        return torch.cat([self.scores(self.others(x), generator), *corners], 1)

    def inverse(self, f: Tensor) -> Tensor:
        """Rows (B, D), float64, whose features are nearest to f (B, F)."""
        scores, groups = self.split(f)
        x = f.new_zeros(len(f), self.count, dtype=torch.float64)
        x[:, self.numbers] = self.scores.inverse(scores)
        for levels, features in zip(self.groups, groups, strict=True):
            x[:, levels.column] = levels.nearest(features, x[:, levels.column])
        return x

    def distance(self, out: Tensor, f: Tensor) -> Tensor:
        """How far a decoder's output is from features f, both (B, F): the mean over scores and groups (B,).

        Half the squared error of scores; for groups, whose outputs are logits, the cross-entropy.
        """
        (scores, groups), (scores_f, groups_f) = self.split(out), self.split(f)
        terms = [(scores - scores_f).square() / 2]
        terms += [-(b * a.log_softmax(1)).sum(1, keepdim=True) for a, b in zip(groups, groups_f, strict=True)]
        return torch.cat(terms, 1).mean(1)

    def places(self, column: int) -> list[int]:
        """The features that a column has: its score, and its levels."""
        where = [self.numbers.index(column)] if column in self.numbers else []
        first = len(self.numbers)
        for levels in self.groups:
            where += range(first, first + levels.width) if levels.column == column else ()
            first += levels.width
        return where


class Perceptron(nn.Module):
    """A linear map and, beside it, a residual perceptron that starts as nothing: (B, in) -> (B, out).

    Args:
        inp: Numbers that go in.
        out: Numbers that come out.
        width: Of the hidden layers.
        depth: Number of residual blocks.
    """

    def __init__(self, inp: int, out: int, width: int, depth: int) -> None:
        super().__init__()
        self.linear, self.enter = nn.Linear(inp, out), nn.Linear(inp, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = zero_init(nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)  # (B, W)
        for block in self.blocks:
            h = h + block(F.silu(F.layer_norm(h, h.shape[-1:])))
        return self.linear(x) + self.leave(F.silu(h))


class TableCodec(Codec):
    """Rows of a table <-> a vector.

    `identity` learns nothing: the latent is the features themselves, whitened, numbers continuous and levels discrete,
    since decoding snaps them to the nearest corner. The others put a perceptron and a bottleneck between.

    Args:
        columns: For each modelled column what `Features` asks for, and `low` and `high`, how far numbers reach.
        bottleneck: `identity`; or `kl`, `vq`, `fsq`, `none` on a learned vector.
        latent_dim: Length of that vector.
        width: Hidden width of encoder and decoder.
        depth: Their residual blocks.
        codebook_size: Codes of `vq`.
        groups: Codes of `vq` per row.
        levels: Levels per channel of `fsq`.

    References:
        Zhang et al. 2024, Mixed-Type Tabular Data Synthesis with Score-based Diffusion in Latent Space (TabSyn),
        arXiv:2310.09656, for diffusion in the latent space of a table's autoencoder.
    """

    prepares = 200_000
    graded = False
    draws = True

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
        count, whole = features.size, bottleneck == "identity"
        options: dict[str, Any] = {"size": codebook_size, "groups": groups} if bottleneck == "vq" else {}
        options |= {"levels": tuple(levels)} if bottleneck == "fsq" and levels else {}
        neck = Plain(count) if whole else make_bottleneck(bottleneck, latent_dim, **options)
        super().__init__((neck.out_channels,))
        self.ends = [[column.get(end) for column in columns] for end in ("low", "high")]
        self.features, self.bottleneck, self.whole = features, neck, whole
        self.encoder = nn.Identity() if whole else Perceptron(count, neck.in_channels, width, depth)
        self.decoder = nn.Identity() if whole else Perceptron(neck.out_channels, count, width, depth)

    def prepare(self, x: Tensor) -> None:
        """Learn how the numbers of rows x (N, D) are distributed; of a part of them, that the others reach as far."""
        if len(x) >= self.prepares:
            known = [[math.nan if cell is None else cell for cell in row] for row in self.ends]
            x = torch.cat([x, x.new_tensor(known)])
        self.features.scores.fit(self.features.others(x))

    def codes(self, x: Tensor) -> Tensor:
        """Raw codes h (B, *latent_shape) of rows x, by the middle of what scores a value holds."""
        return self.bottleneck.mode(self.encoder(self.features(x))).float()  # type: ignore[operator]

    def draw(self, x: Tensor, generator: Generator) -> Tensor:
        """Latents of rows x whose scores are drawn anew."""
        with torch.no_grad():
            h = self.bottleneck.mode(self.encoder(self.features(x, generator))).float()  # type: ignore[operator]
            return self.whitened(h)

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The training path: the decoder's output (B, F), the bottleneck's loss (B,), and what it has to tell."""
        h, loss, info = self.bottleneck(self.encoder(self.features(x, generator)), generator)
        return self.decoder(h), loss, info

    def distance(self, x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
        """How far the decoder's output x_hat (B, F) is from rows x (B, D); `kind` is for images."""
        return self.features.distance(x_hat.float(), self.features(x))

    def decode(self, latent: Latent | Tensor) -> Tensor:
        """Rows (B, D), float64, NaN where missing, of latents z (B, *latent_shape)."""
        z = latent.z if isinstance(latent, Latent) else latent
        h = self.bottleneck.snap(z * self.latent_std + self.latent_mean)  # type: ignore[operator]
        with torch.autocast(h.device.type, enabled=False):  # in bfloat16 numbers would be of some hundred values
            return self.features.inverse(self.decoder(h))

    @torch.no_grad()
    def learn_statistics(self, h: Tensor | Iterable[Tensor], floor: float = 1e-3) -> None:
        """As for every codec; but the levels of a group, if they are the latent, have a deviation of `APART` together.

        Alone they would be as far apart as they are rare, or many: then all but the last of the noise would leave no
        doubt which one it is, and the network would be asked about it at few times only. Twice that of numbers, levels
        are decided on before numbers are, which are then told apart by them.
        """
        super().learn_statistics(h, floor)
        if self.whole:
            scores, groups = self.features.split(self.latent_std[None])
            shared = [(group.square().sum().sqrt() / APART).expand_as(group) for group in groups]
            self.latent_std.copy_(torch.cat([scores, *shared], 1)[0])

    def untouched(self, mask: Tensor, present: bool = True) -> Tensor:
        """The positions (B, D) that stand for cells outside a mask (B, columns).

        If cells have to be present, so do those that say a cell is missing: it is known that it is not.

        Raises:
            UserError: The latent is a learned one, where each position stands for the whole row.
        """
        if not self.whole:
            raise UserError("cells can be filled in by a model with codec.bottleneck=identity alone", code=1)
        known = torch.ones(len(mask), self.latent_size, dtype=torch.bool, device=mask.device)
        for column in range(self.features.count):
            known[:, self.features.places(column)] = ~mask[:, column, None]
        end = len(self.features.numbers)
        for levels in self.features.groups:
            end += levels.width
            known[:, end - 1] |= levels.missing and present
        return known

    def corners(self) -> Corners | None:
        """The levels, if they are the latent."""
        start = len(self.features.numbers)
        if not (self.whole and self.features.groups):
            return None
        return Corners(start, self.features.widths, self.latent_mean[start:], self.latent_std[start:])
