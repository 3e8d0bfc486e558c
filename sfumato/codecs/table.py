"""Codecs for rows of a table: numbers as normal scores, categories as corners, with or without a learned code."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.codecs.base import Codec
from sfumato.codecs.bottleneck import Plain, make_bottleneck
from sfumato.codecs.scores import Scores
from sfumato.nn.blocks import zero_init
from sfumato.types import Latent


class Category(NamedTuple):
    """A column of categories: its number, its levels (a missing cell may be the last), its features."""

    column: int
    levels: int
    missing: bool

    @property
    def width(self) -> int:
        """Number of features: one for two levels, else one for each."""
        return 1 if self.levels == 2 else self.levels

    def corner(self, x: Tensor) -> Tensor:
        """Features (B, width) of level indices x (B,): -1 or 1, or a one among zeros; zeros for what is no level."""
        level = torch.where(x.isnan(), self.levels - 1 if self.missing else -1, x).long()
        if self.levels == 2:
            return torch.where(level < 0, 0.0, 2.0 * level - 1)[:, None]
        return (level[:, None] == torch.arange(self.levels, device=x.device)).float()

    def nearest(self, f: Tensor) -> Tensor:
        """Level indices (B,) of features or logits f (B, width); NaN where missing."""
        level = (f[:, 0] > 0).long() if self.levels == 2 else f.argmax(1)
        return torch.where((level == self.levels - 1) & self.missing, torch.nan, level.double())

    def cross_entropy(self, out: Tensor, f: Tensor) -> Tensor:
        """In nats (B,), of logits (B, width) beside features f."""
        if self.levels == 2:
            return F.binary_cross_entropy_with_logits(out[:, 0], (f[:, 0] + 1) / 2, reduction="none")
        return -(f * out.log_softmax(1)).sum(1)


class Features(nn.Module):
    """Rows (B, D) of numbers, level indices and NaN where missing -> features (B, F), and back.

    First the normal scores of all numbers, then a flag for each number that may be missing (+1 where it is, else -1),
    then the corners of each category.

    Args:
        columns: For each of the D columns `levels` (0 for numbers) and `missing`, whether cells may be.
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.numbers = [j for j, column in enumerate(columns) if not column["levels"]]
        self.flags = [j for j in self.numbers if columns[j]["missing"]]
        self.categories = [
            Category(j, column["levels"] + bool(column["missing"]), bool(column["missing"]))
            for j, column in enumerate(columns)
            if column["levels"]
        ]
        self.scores = Scores(len(self.numbers))

    @property
    def widths(self) -> list[int]:
        """Features of each number, each flag and each category."""
        return [1] * (len(self.numbers) + len(self.flags)) + [category.width for category in self.categories]

    def split(self, f: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Scores (B, n), flags (B, m) and the features of each category."""
        scores, flags, *groups = f.split([len(self.numbers), len(self.flags), *(c.width for c in self.categories)], 1)
        return scores, flags, groups

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Features (B, F), float32, of rows x (B, D), float64; scores are drawn from the CPU's generator if given."""
        missing = 2 * x[:, self.flags].isnan().float() - 1
        corners = [category.corner(x[:, category.column]) for category in self.categories]
        return torch.cat([self.scores(x[:, self.numbers], generator), missing, *corners], 1)

    def inverse(self, f: Tensor) -> Tensor:
        """Rows (B, D), float64, whose features are nearest to f (B, F)."""
        scores, flags, groups = self.split(f)
        x = f.new_zeros(len(f), len(self.numbers) + len(self.categories), dtype=torch.float64)
        x[:, self.numbers] = self.scores.inverse(scores)
        x[:, self.flags] = torch.where(flags > 0, torch.nan, x[:, self.flags])
        for category, group in zip(self.categories, groups, strict=True):
            x[:, category.column] = category.nearest(group)
        return x

    def distance(self, out: Tensor, f: Tensor) -> Tensor:
        """How far a decoder's output is from features f, both (B, F): the mean over columns (B,).

        Half the squared error of scores; for flags and categories, whose outputs are logits, the cross-entropy.
        """
        (scores, flags, groups), (scores_f, flags_f, groups_f) = self.split(out), self.split(f)
        terms = [(scores - scores_f).square() / 2]
        terms += [F.binary_cross_entropy_with_logits(flags, (flags_f + 1) / 2, reduction="none")]
        terms += [c.cross_entropy(a, b)[:, None] for c, a, b in zip(self.categories, groups, groups_f, strict=True)]
        return torch.cat(terms, 1).mean(1)


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

    `identity` learns nothing: the latent is the features themselves, whitened, numbers continuous and categories
    discrete, since decoding snaps them to the nearest corner. The others put a perceptron and a bottleneck between.

    Args:
        columns: For each modelled column `name`, `levels` (0 for numbers) and `missing`.
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
        count, whole = sum(features.widths), bottleneck == "identity"
        options: dict[str, Any] = {"size": codebook_size, "groups": groups} if bottleneck == "vq" else {}
        options |= {"levels": tuple(levels)} if bottleneck == "fsq" and levels else {}
        neck = Plain(count) if whole else make_bottleneck(bottleneck, latent_dim, **options)
        super().__init__((neck.out_channels,))
        self.features, self.bottleneck, self.whole = features, neck, whole
        self.encoder = nn.Identity() if whole else Perceptron(count, neck.in_channels, width, depth)
        self.decoder = nn.Identity() if whole else Perceptron(neck.out_channels, count, width, depth)

    def prepare(self, x: Tensor) -> None:
        """Learn how the numbers of rows x (N, D) are distributed."""
        self.features.scores.fit(x[:, self.features.numbers])

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
        return self.features.inverse(self.decoder(h).float())

    @torch.no_grad()
    def learn_statistics(self, h: Tensor | Iterable[Tensor], floor: float = 1e-3) -> None:
        """As for every codec; but the corners of one category, if they are the latent, share a deviation.

        Else a rare level would be as far away as it is rare.
        """
        super().learn_statistics(h, floor)
        if self.whole:
            groups = self.latent_std.split(self.features.widths)
            shared = [group.square().mean().sqrt().expand_as(group) for group in groups]
            self.latent_std.copy_(torch.cat(shared))
