"""The convolutional U-Net with adaptive group norm, on grids of any size with one to three axes."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.layers import (
    CONVS,
    Attention,
    CrossAttention,
    Embedding,
    add_concat,
    channels_and_grid,
    from_grid,
    modulate,
    norm,
    to_grid,
    zero_init,
)
from sfumato.types import Cond

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class GroupNorm(nn.GroupNorm):
    """Group norm whose statistics can exclude masked positions."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(channels, 16), channels, eps=1e-5)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (B, C, *grid) over the positions where the mask (B, 1, *grid) is one; the others become zero."""
        if mask is None:
            # the method of nn.GroupNorm refuses a group of one value, which the lowest level of a short item can have
            return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        h = (input * mask).float().unflatten(1, (self.num_groups, -1))  # (B, G, C / G, *grid)
        keep, axes = mask.float()[:, None], tuple(range(2, h.ndim))
        count = (keep.sum(axes, keepdim=True) * h.shape[2]).clamp(min=1)
        h = (h - h.sum(axes, keepdim=True) / count) * keep
        h = h * (h.square().sum(axes, keepdim=True) / count + self.eps).rsqrt()
        weight, bias = (p.view(-1, *[1] * (input.ndim - 2)) for p in (self.weight, self.bias))
        return ((h.flatten(1, 2) * weight + bias) * mask).to(input.dtype)


class ResBlock(nn.Module):
    """Two convolutions with a residual path; the embedding shifts and scales the second norm (adaGN).

    Args:
        axes: Number of grid axes.
        channels_in: Input channels.
        channels: Output channels.
        embedding_dim: Length E of the embedding.
    """

    def __init__(self, axes: int, channels_in: int, channels: int, embedding_dim: int) -> None:
        super().__init__()
        conv = CONVS[axes]
        self.norm_in, self.norm_out = GroupNorm(channels_in), GroupNorm(channels)
        self.conv_in = conv(channels_in, channels, 3, padding=1)
        self.modulation = zero_init(nn.Linear(embedding_dim, 2 * channels))
        self.conv_out = zero_init(conv(channels, channels, 3, padding=1))
        self.skip = conv(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, e: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, C, *grid), modulated by e (B, *grid or ones, E)."""
        shift, scale = self.modulation(e).movedim(-1, 1).chunk(2, dim=1)  # (B, C, *grid or ones) each
        h = self.conv_in(F.silu(self.norm_in(x, mask)))
        h = F.silu(modulate(self.norm_out(h, mask), shift, scale))
        return self.skip(x) + self.conv_out(h if mask is None else h * mask)


class UNetBlock(nn.Module):
    """A residual block, followed by attention among all positions and to condition tokens unless `heads` is zero.

    Args:
        axes: Number of grid axes.
        channels_in: Input channels.
        channels: Output channels.
        embedding_dim: Length E of the embedding.
        heads: Attention heads, or zero.
        token_dim: Length D of a condition token; 0 for no attention to them.
    """

    def __init__(
        self, axes: int, channels_in: int, channels: int, embedding_dim: int, heads: int, token_dim: int = 0
    ) -> None:
        super().__init__()
        self.residual = ResBlock(axes, channels_in, channels, embedding_dim)
        self.attention = Attention(channels, heads) if heads else None
        if self.attention is not None:
            zero_init(self.attention.out)
        self.cross_attention = CrossAttention(channels, heads, token_dim) if heads and token_dim else None

    def forward(self, x: Tensor, e: Tensor, cond: Cond, mask: Tensor | None = None) -> Tensor:
        """Map x (B, C, *grid), modulated by e (B, *grid or ones, E), with the tokens of `cond`."""
        x = self.residual(x, e, mask)
        if self.attention is not None:
            keep = None if mask is None else mask.flatten(1) > 0
            x = x + _unflatten(self.attention(_positions(x), mask=keep), x)
        if self.cross_attention is not None and cond.tokens is not None:
            x = x + _unflatten(self.cross_attention(_positions(x), cond.tokens, cond.mask), x)
        return x


def _positions(x: Tensor) -> Tensor:
    """The positions of x (B, C, *grid), normalised, (B, N, C)."""
    return norm(x.flatten(2).transpose(1, 2))


def _unflatten(h: Tensor, x: Tensor) -> Tensor:
    """Positions h (B, N, C) on the grid of x (B, C, *grid)."""
    return h.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """Convolutional U-Net with adaptive group norm (Dhariwal and Nichol 2021, arXiv:2105.05233).

    Each level halves the grid, rounding up, and the decoder restores the same sizes, so a grid of any size works.

    Args:
        latent_shape: Shape of a latent: (C, *grid) with one to three axes, (N, D) with `channels_last`, or (D,): one
            channel on D positions.
        cond_dim: Length of `Cond.vector`; 0 for none.
        width: Channels of the first level.
        depth: Blocks per level, in the encoder and again in the decoder.
        heads: Attention heads.
        multipliers: Channels of each level as multiples of `width`.
        max_attention_positions: Levels with at most this many grid positions (for `latent_shape`) use attention.
        embedding_dim: Length of the embedding of clocks and condition.
        clocks: Number K of clocks (time inputs).
        concat: Channels of `Cond.concat`.
        token_dim: Length of a token of `Cond.tokens`; 0 for none.
        channels_last: Whether a latent is tokens (N, D). N is the largest number; there may be fewer.

    Raises:
        UserError: If the width is not a multiple of 2 * heads, or no level has attention to read condition tokens.
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        cond_dim: int = 0,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        multipliers: Sequence[int] = (1, 2, 2),
        max_attention_positions: int = 256,
        embedding_dim: int = 256,
        clocks: int = 1,
        concat: int = 0,
        token_dim: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise UserError(f"width={width} must be a multiple of 2 * heads = {2 * heads}; change width or heads")
        channels, grid = channels_and_grid(latent_shape, channels_last)
        conv = CONVS[len(grid)]
        self.depth, self.concat, self.token_dim, self.channels_last = depth, concat, token_dim, channels_last
        sizes = [width * m for m in multipliers]
        positions = [math.prod(-(-n // 2**i) for n in grid) for i in range(len(sizes))]  # of each level
        if token_dim and positions[-1] > max_attention_positions:
            raise UserError(
                f"max_attention_positions={max_attention_positions} leaves no level with attention to condition "
                f"tokens; it must be at least {positions[-1]}"
            )
        levels = [(c, heads if n <= max_attention_positions else 0) for c, n in zip(sizes, positions, strict=True)]
        block = partial(UNetBlock, len(grid), embedding_dim=embedding_dim, token_dim=token_dim)
        self.embedding = Embedding(embedding_dim, clocks, cond_dim)
        self.z_in = conv(channels + concat, width, 3, padding=1)
        self.down = nn.ModuleList(block(c, c, heads=h) for c, h in levels for _ in range(depth))
        self.shrink = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.middle = nn.ModuleList(block(sizes[-1], sizes[-1], heads=h) for h in (levels[-1][1], 0))
        self.up = nn.ModuleList(block(2 * c, c, heads=h) for c, h in levels[::-1] for _ in range(depth))
        self.grow = nn.ModuleList(conv(a, b, 3, padding=1) for a, b in pairwise(sizes[::-1]))
        self.norm_out = GroupNorm(width)
        self.z_out = zero_init(conv(width, channels, 3, padding=1))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in execution order."""
        return [*self.down, *self.middle, *self.up]

    def forward(self, z: Tensor, clocks: Tensor, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """Map latents to an output of the same shape.

        Args:
            z: Latents (B, *latent_shape), or of another grid.
            clocks: Clocks (B, K), or (B, N, K) for each position.
            cond: The condition: `vector` (B, cond_dim), `tokens` (B, M, token_dim) with `mask` (B, M), and `concat`
                (B, concat, *grid), always channels first.
            mask: (B, N), true where a position has data; other positions are read as zeros and not attended to.
        """
        cond = cond or Cond()
        assert self.token_dim or cond.tokens is None, "got condition tokens, but the network was built with token_dim=0"
        x = add_concat(to_grid(z, self.channels_last), cond.concat, self.concat, mask)  # (B, C, *grid)
        masks = self._level_masks(x, mask)
        es = self._level_embeddings(self.embedding(clocks, cond.vector), x.shape[2:])
        h, skips = self._encode(x, es, cond, masks)
        for block in self.middle:
            h = block(h, es[-1], cond, masks[-1])
        h = self._decode(h, skips, es, cond, masks)
        h = self.z_out(F.silu(self.norm_out(h, masks[0])))
        return from_grid(h, z.shape, self.channels_last)

    def _level_masks(self, x: Tensor, mask: Tensor | None) -> list[Tensor] | list[None]:
        levels = len(self.shrink) + 1
        if mask is None:
            return [None] * levels
        masks = [mask.reshape(-1, 1, *x.shape[2:]).to(x.dtype)]
        for _ in self.shrink:
            last = masks[-1]
            padding = [side for n in reversed(last.shape[2:]) for side in (0, n % 2)]
            masks.append(POOLS[last.ndim - 2](F.pad(last, padding), 2))
        return masks

    def _level_embeddings(self, e: Tensor, grid: Sequence[int]) -> list[Tensor]:
        """The embedding for each level, (B, *ones, E), or (B, *grid, E) subsampled to the level's grid."""
        if e.ndim == 2:
            return [e.reshape(len(e), *[1] * len(grid), -1)] * (len(self.shrink) + 1)
        es = [e.reshape(len(e), *grid, -1)]
        for _ in self.shrink:
            es.append(es[-1][(slice(None), *[slice(None, None, 2)] * len(grid))])
        return es

    def _encode(
        self, h: Tensor, es: list[Tensor], cond: Cond, masks: list[Tensor] | list[None]
    ) -> tuple[Tensor, list[Tensor]]:
        h, skips = self.z_in(h), []
        for level, (e, mask) in enumerate(zip(es, masks, strict=True)):
            if level:
                h = self.shrink[level - 1](_masked(h, masks[level - 1]))
            for block in self.down[level * self.depth : (level + 1) * self.depth]:
                h = block(h, e, cond, mask)
                skips.append(h)
        return h, skips

    def _decode(
        self, h: Tensor, skips: list[Tensor], es: list[Tensor], cond: Cond, masks: list[Tensor] | list[None]
    ) -> Tensor:
        for step, (e, mask) in enumerate(zip(es[::-1], masks[::-1], strict=True)):
            if step:
                size = skips[-1].shape[2:]
                h = self.grow[step - 1](_masked(F.interpolate(h, size=size), mask))
            for block in self.up[step * self.depth : (step + 1) * self.depth]:
                h = block(torch.cat((h, skips.pop()), dim=1), e, cond, mask)
        return h


def _masked(h: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the masked positions, which a convolution would otherwise spread to their neighbours."""
    return h if mask is None else h * mask
