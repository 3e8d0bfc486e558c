"""The convolutional U-Net with adaptive group norm, on grids of any size with one to three axes."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.layers import (
    CONVS,
    Attention,
    Embedding,
    add_concat,
    channel_count,
    modulate,
    norm,
    spatial_shape,
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
            return super().forward(input)
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
    """A residual block, followed by self-attention over all positions unless `heads` is zero.

    Args:
        axes: Number of grid axes.
        channels_in: Input channels.
        channels: Output channels.
        embedding_dim: Length E of the embedding.
        heads: Attention heads, or zero.
    """

    def __init__(self, axes: int, channels_in: int, channels: int, embedding_dim: int, heads: int) -> None:
        super().__init__()
        self.residual = ResBlock(axes, channels_in, channels, embedding_dim)
        self.attention = Attention(channels, heads) if heads else None
        if self.attention is not None:
            zero_init(self.attention.out)

    def forward(self, x: Tensor, e: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, C, *grid), modulated by e (B, *grid or ones, E)."""
        x = self.residual(x, e, mask)
        if self.attention is None:
            return x
        keep = None if mask is None else mask.flatten(1) > 0
        h = self.attention(norm(x.flatten(2).transpose(1, 2)), mask=keep)  # (B, N, C)
        return x + h.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """Convolutional U-Net with adaptive group norm (Dhariwal and Nichol 2021, arXiv:2105.05233).

    Each level halves the grid, rounding up, and the decoder restores the same sizes, so a grid of any size works.

    Args:
        latent_shape: Shape of a latent: (C, *grid) with one to three axes, or (D,): one channel on D positions.
        cond_dim: Length of `Cond.vector`; 0 for none.
        width: Channels of the first level.
        depth: Blocks per level, in the encoder and again in the decoder.
        heads: Attention heads.
        multipliers: Channels of each level as multiples of `width`.
        max_attention_positions: Levels with at most this many grid positions (for `latent_shape`) use attention.
        embedding_dim: Length of the embedding of clocks and condition.
        clocks: Number K of clocks (time inputs).
        concat: Channels of `Cond.concat`.

    Raises:
        UserError: If the width is not a multiple of 2 * heads.
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
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise UserError(f"width={width} must be a multiple of 2 * heads = {2 * heads}; change width or heads")
        grid, self.channels = spatial_shape(latent_shape), channel_count(latent_shape)
        axes, conv = len(grid), CONVS[len(grid)]
        self.depth, self.concat = depth, concat
        sizes = [width * m for m in multipliers]
        levels = list(enumerate(sizes))
        attention_heads = [
            heads if math.prod(-(-n // 2**i) for n in grid) <= max_attention_positions else 0 for i, _ in levels
        ]
        self.embedding = Embedding(embedding_dim, clocks, cond_dim)
        self.z_in = conv(self.channels + concat, width, 3, padding=1)
        self.down = nn.ModuleList(
            UNetBlock(axes, c, c, embedding_dim, attention_heads[i]) for i, c in levels for _ in range(depth)
        )
        self.shrink = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.middle = nn.ModuleList(
            UNetBlock(axes, sizes[-1], sizes[-1], embedding_dim, h) for h in (attention_heads[-1], 0)
        )
        self.up = nn.ModuleList(
            UNetBlock(axes, 2 * c, c, embedding_dim, attention_heads[i]) for i, c in levels[::-1] for _ in range(depth)
        )
        self.grow = nn.ModuleList(conv(a, b, 3, padding=1) for a, b in pairwise(sizes[::-1]))
        self.norm_out = GroupNorm(width)
        self.z_out = zero_init(conv(width, self.channels, 3, padding=1))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in execution order."""
        return [*self.down, *self.middle, *self.up]

    def forward(self, z: Tensor, clocks: Tensor, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """Map latents to an output of the same shape.

        Args:
            z: Latents (B, *latent_shape).
            clocks: Clocks (B, K), or (B, N, K) for each grid position.
            cond: The condition: `vector` (B, cond_dim) and `concat` (B, concat, *grid); tokens are not supported.
            mask: (B, N), true where a grid position has data; other positions are read as zeros.
        """
        cond = cond or Cond()
        assert cond.tokens is None, "UNet does not support condition tokens"
        x = z.reshape(z.shape[0], self.channels, *spatial_shape(z.shape[1:]))  # (B, C, *grid)
        masks = self._level_masks(x, mask)
        es = self._level_embeddings(self.embedding(clocks, cond.vector), x.shape[2:])
        x = x if mask is None else torch.where(mask.reshape(-1, 1, *x.shape[2:]), x, 0)
        h = add_concat(x, cond.concat, self.concat)
        h, skips = self._encode(_masked(h, masks[0]), es, masks)
        for block in self.middle:
            h = block(h, es[-1], masks[-1])
        h = self._decode(h, skips, es, masks)
        return self.z_out(F.silu(self.norm_out(h, masks[0]))).reshape(z.shape)

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

    def _encode(self, h: Tensor, es: list[Tensor], masks: list[Tensor] | list[None]) -> tuple[Tensor, list[Tensor]]:
        h, skips = self.z_in(h), []
        for level, (e, mask) in enumerate(zip(es, masks, strict=True)):
            if level:
                h = self.shrink[level - 1](_masked(h, masks[level - 1]))
            for block in self.down[level * self.depth : (level + 1) * self.depth]:
                h = block(h, e, mask)
                skips.append(h)
        return h, skips

    def _decode(self, h: Tensor, skips: list[Tensor], es: list[Tensor], masks: list[Tensor] | list[None]) -> Tensor:
        for step, (e, mask) in enumerate(zip(es[::-1], masks[::-1], strict=True)):
            if step:
                size = skips[-1].shape[2:]
                h = self.grow[step - 1](_masked(F.interpolate(h, size=size), mask))
            for block in self.up[step * self.depth : (step + 1) * self.depth]:
                h = block(torch.cat((h, skips.pop()), dim=1), e, mask)
        return h


def _masked(h: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the masked positions, which a convolution would otherwise spread to their neighbours."""
    return h if mask is None else h * mask
