"""The diffusion transformer: patches of a latent grid as tokens, modulated by adaLN-zero."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.layers import (
    Attention,
    CrossAttention,
    Embedding,
    FeedForward,
    add_concat,
    channels_and_grid,
    from_grid,
    modulate,
    norm,
    rotary_angles,
    to_grid,
    zero_init,
)
from sfumato.types import Cond

POSITIONS = ("both", "rope", "learned")


def patchify(x: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Cut x (B, C, *grid) into tokens (B, N, C * prod(patch)), with zero padding at the end of each axis.

    Returns:
        The tokens, and the size of their grid.
    """
    padding = [(-size) % p for size, p in zip(x.shape[2:], patch, strict=True)]
    if any(padding):
        x = F.pad(x, [side for n in reversed(padding) for side in (0, n)])
    grid = tuple(size // p for size, p in zip(x.shape[2:], patch, strict=True))
    x = x.reshape(*x.shape[:2], *[n for pair in zip(grid, patch, strict=True) for n in pair])
    axes = len(grid)
    x = x.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))  # (B, *grid, C, *patch)
    return x.flatten(1 + axes).flatten(1, axes), grid


def unpatchify(h: Tensor, grid: Sequence[int], patch: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: tokens (B, N, C * prod(patch)) on a grid to (B, C, *shape), without the padding."""
    axes = len(grid)
    h = h.reshape(h.shape[0], *grid, -1, *patch)
    h = h.permute(0, 1 + axes, *[i for k in range(axes) for i in (1 + k, 2 + axes + k)])  # (B, C, g_1, p_1, ...)
    h = h.reshape(*h.shape[:2], *[n * p for n, p in zip(grid, patch, strict=True)])
    for axis, size in enumerate(shape, start=2):
        h = h.narrow(axis, 0, size)
    return h


class DiTBlock(nn.Module):
    """Attention and feed-forward, each with shift, scale and gate from the embedding (adaLN-zero).

    Between them come the condition tokens by cross-attention, as in PixArt-alpha (Chen et al. 2023, arXiv:2310.00426).

    Args:
        width: Channels W.
        heads: Attention heads.
        expansion: Hidden width of the feed-forward as a multiple of W.
        swiglu: Use SwiGLU instead of GELU.
        embedding_dim: Length E of the embedding.
        skip: Whether to add the output of an earlier block through a linear layer that starts at zero.
        token_dim: Length D of a condition token; 0 for no cross-attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expansion: float = 4.0,
        swiglu: bool = True,
        embedding_dim: int = 256,
        skip: bool = False,
        token_dim: int = 0,
    ) -> None:
        super().__init__()
        self.modulation = zero_init(nn.Linear(embedding_dim, 6 * width))
        self.attention = Attention(width, heads)
        self.cross_attention = CrossAttention(width, heads, token_dim) if token_dim else None
        self.feed_forward = FeedForward(width, expansion, swiglu)
        self.skip = zero_init(nn.Linear(width, width)) if skip else None

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        cond: Cond,
        angles: Tensor | None = None,
        mask: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> Tensor:
        """Map tokens x (B, N, W), modulated by e (B, 1, E) or (B, N, E), with the tokens of `cond`."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(e).chunk(6, dim=-1)
        if self.skip is not None and earlier is not None:
            x = x + self.skip(earlier)
        x = torch.addcmul(x, gate_a, self.attention(modulate(norm(x), shift_a, scale_a), angles, mask))
        if self.cross_attention is not None and cond.tokens is not None:
            x = x + self.cross_attention(norm(x), cond.tokens, cond.mask)
        return torch.addcmul(x, gate_f, self.feed_forward(modulate(norm(x), shift_f, scale_f)))


class DiT(nn.Module):
    """Diffusion transformer on latents with one to three grid axes (Peebles and Xie 2023, arXiv:2212.09748).

    Queries and keys are normalised; long skips follow U-ViT (Bao et al. 2023, arXiv:2209.12152). Every block reads the
    condition tokens by cross-attention. The grid may differ from the one in `latent_shape`, but with learned positions
    it must not be larger.

    Args:
        latent_shape: Shape of a latent: (C, *grid), (N, D) with `channels_last`, or (D,): one channel on D positions.
        cond_dim: Length of `Cond.vector`; 0 for none.
        width: Channels W of a token.
        depth: Number of blocks.
        heads: Attention heads; must divide W.
        patch: Side of a patch, or one for each axis. The grid is padded at its end if the side does not divide it.
        expansion: Hidden width of the feed-forward as a multiple of W.
        swiglu: Use SwiGLU instead of GELU, with about as many parameters.
        positions: `rope` (relative, rotary), `learned` (absolute) or `both`.
        theta: Ratio of the highest rotary frequency to the lowest.
        skips: Whether blocks of the second half also get the outputs of the first half, in reverse order.
        embedding_dim: Length E of the embedding of clocks and condition vector.
        clocks: Number K of clocks (time inputs).
        concat: Channels of `Cond.concat`.
        token_dim: Length of a token of `Cond.tokens`; 0 for none.
        channels_last: Whether a latent is tokens (N, D). N is the largest number; there may be fewer.

    Raises:
        UserError: If the width is not a multiple of 2 * heads, or `positions` is unknown.
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        cond_dim: int = 0,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int | Sequence[int] = 2,
        expansion: float = 4.0,
        swiglu: bool = True,
        positions: str = "both",
        theta: float = 100.0,
        skips: bool = False,
        embedding_dim: int = 256,
        clocks: int = 1,
        concat: int = 0,
        token_dim: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise UserError(f"width={width} must be a multiple of 2 * heads = {2 * heads}; change width or heads")
        if positions not in POSITIONS:
            raise UserError(f"positions={positions!r} is unknown; choose one of {', '.join(POSITIONS)}")
        channels, shape = channels_and_grid(latent_shape, channels_last)
        self.patch = (patch,) * len(shape) if isinstance(patch, int) else tuple(patch)
        self.concat, self.token_dim, self.channels_last = concat, token_dim, channels_last
        self.head_dim, self.theta = width // heads, theta if positions != "learned" else 0.0
        grid = [-(-size // p) for size, p in zip(shape, self.patch, strict=True)]
        # the positional embedding, under the name that saved weights have
        self.places = nn.Parameter(0.02 * torch.randn(*grid, width)) if positions != "rope" else None
        self.embedding = Embedding(embedding_dim, clocks, cond_dim)
        self.z_in = nn.Linear((channels + concat) * math.prod(self.patch), width)
        has_skip = [skips and i >= (depth + 1) // 2 for i in range(depth)]
        block = partial(DiTBlock, width, heads, expansion=expansion, swiglu=swiglu, embedding_dim=embedding_dim)
        self.blocks = nn.ModuleList(block(skip=skip, token_dim=token_dim) for skip in has_skip)
        self.modulation = zero_init(nn.Linear(embedding_dim, 2 * width))
        self.z_out = zero_init(nn.Linear(width, channels * math.prod(self.patch)))

    def forward(self, z: Tensor, clocks: Tensor, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """Map latents to an output of the same shape.

        Args:
            z: Latents (B, *latent_shape), or of another grid.
            clocks: Clocks (B, K), or (B, N, K) for each patch or for each position; a patch then takes the clocks of
                its first position.
            cond: The condition: `vector` (B, cond_dim), `tokens` (B, M, token_dim) with `mask` (B, M), and `concat`
                (B, concat, *grid), always channels first.
            mask: (B, N), true where a position has data; other positions are read as zeros and not attended to.
        """
        cond = cond or Cond()
        assert self.token_dim or cond.tokens is None, "got condition tokens, but the network was built with token_dim=0"
        x = add_concat(to_grid(z, self.channels_last), cond.concat, self.concat, mask)  # (B, C, *shape)
        shape = x.shape[2:]
        h, grid = self._patch_tokens(x)  # (B, N, W)
        e = self.embedding(self._token_clocks(clocks, shape, math.prod(grid)), cond.vector)
        e = e[:, None] if e.ndim == 2 else e  # (B, 1 or N, E)
        h = self._run_blocks(h, e, grid, cond, self._attended(mask, shape))
        shift, scale = self.modulation(e).chunk(2, dim=-1)
        h = self.z_out(modulate(norm(h), shift, scale))  # (B, N, C P)
        return from_grid(unpatchify(h, grid, self.patch, shape), z.shape, self.channels_last)

    def _attended(self, mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """Whether each patch has data in any position of the mask (B, prod(shape))."""
        if mask is None:
            return None
        return patchify(mask.reshape(-1, 1, *shape).to(torch.uint8), self.patch)[0].sum(-1) > 0

    def _patch_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The tokens (B, N, W) of the patches of x (B, C, *shape), with their positions, and the size of their grid."""
        h, grid = patchify(x, self.patch)
        h = self.z_in(h)
        if self.places is not None:
            assert all(n <= limit for n, limit in zip(grid, self.places.shape, strict=False)), (
                f"too few learned positions for the grid {grid}"
            )
            positions = self.places[tuple(slice(n) for n in grid)].flatten(0, -2)
            h = h + positions.to(h.dtype)
        return h, grid

    def _token_clocks(self, clocks: Tensor, shape: Sequence[int], count: int) -> Tensor:
        if clocks.ndim == 2 or clocks.shape[1] == count:
            return clocks
        first = tuple(slice(None, None, p) for p in self.patch)
        return clocks.reshape(clocks.shape[0], *shape, -1)[(slice(None), *first)].flatten(1, -2)

    def _run_blocks(self, h: Tensor, e: Tensor, grid: Sequence[int], cond: Cond, attended: Tensor | None) -> Tensor:
        angles = rotary_angles(grid, self.head_dim, self.theta, h.device) if self.theta else None
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            h = block(h, e, cond, angles, attended, outputs.pop() if block.skip is not None else None)
            if i < len(self.blocks) // 2:
                outputs.append(h)
        return h
