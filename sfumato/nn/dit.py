"""The diffusion transformer: patches of a latent grid as tokens, modulated by adaLN-zero."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.layers import (
    Attention,
    Embedding,
    FeedForward,
    add_concat,
    channel_count,
    modulate,
    norm,
    rotary_angles,
    spatial_shape,
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

    Args:
        width: Channels W.
        heads: Attention heads.
        expansion: Hidden width of the feed-forward as a multiple of W.
        swiglu: Use SwiGLU instead of GELU.
        embedding_dim: Length E of the embedding.
        skip: Whether to add the output of an earlier block through a linear layer that starts at zero.
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
    ) -> None:
        super().__init__()
        self.modulation = zero_init(nn.Linear(embedding_dim, 6 * width))
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, expansion, swiglu)
        self.skip = zero_init(nn.Linear(width, width)) if skip else None

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        angles: Tensor | None = None,
        mask: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> Tensor:
        """Map tokens x (B, N, W), modulated by e (B, 1, E) or (B, N, E)."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(e).chunk(6, dim=-1)
        if self.skip is not None and earlier is not None:
            x = x + self.skip(earlier)
        x = torch.addcmul(x, gate_a, self.attention(modulate(norm(x), shift_a, scale_a), angles, mask))
        return torch.addcmul(x, gate_f, self.feed_forward(modulate(norm(x), shift_f, scale_f)))


class DiT(nn.Module):
    """Diffusion transformer on latents with one to three grid axes (Peebles and Xie 2023, arXiv:2212.09748).

    Queries and keys are normalised; long skips follow U-ViT (Bao et al. 2023, arXiv:2209.12152). Condition tokens are
    prepended to the sequence. The grid may differ from the one in `latent_shape`, but with learned positions it must
    not be larger.

    Args:
        latent_shape: Shape of a latent: (C, *grid), (*grid, C) with `channels_last`, or (D,): one channel on D
            positions.
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
        token_dim: Length D of a token of `Cond.tokens`; 0 for none.
        channels_last: Whether the channel axis of a latent is its last.

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
        if channels_last:
            latent_shape = (latent_shape[-1], *latent_shape[:-1])
        shape, channels = spatial_shape(latent_shape), channel_count(latent_shape)
        self.patch = (patch,) * len(shape) if isinstance(patch, int) else tuple(patch)
        self.channels, self.concat, self.channels_last = channels, concat, channels_last
        self.head_dim, self.theta = width // heads, theta if positions != "learned" else 0.0
        grid = [-(-size // p) for size, p in zip(shape, self.patch, strict=True)]
        # the positional embedding, under the name that saved weights have
        self.places = nn.Parameter(0.02 * torch.randn(*grid, width)) if positions != "rope" else None
        self.embedding = Embedding(embedding_dim, clocks, cond_dim)
        self.z_in = nn.Linear((channels + concat) * math.prod(self.patch), width)
        self.tokens_in = nn.Linear(token_dim, width) if token_dim else None
        has_skip = [skips and i >= (depth + 1) // 2 for i in range(depth)]
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, expansion=expansion, swiglu=swiglu, embedding_dim=embedding_dim, skip=skip)
            for skip in has_skip
        )
        self.modulation = zero_init(nn.Linear(embedding_dim, 2 * width))
        self.z_out = zero_init(nn.Linear(width, channels * math.prod(self.patch)))

    def forward(self, z: Tensor, clocks: Tensor, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """Map latents to an output of the same shape.

        Args:
            z: Latents (B, *latent_shape).
            clocks: Clocks (B, K), or (B, N, K) for each token or for each grid position; a patch then takes the
                clocks of its first position.
            cond: The condition: `vector` (B, cond_dim), `tokens` (B, M, token_dim) with `mask` (B, M), and `concat`
                (B, concat, *grid), always channels first.
            mask: (B, N), true where a grid position has data; other positions are read as zeros and not attended to.
        """
        cond = cond or Cond()
        x = z.movedim(-1, 1) if self.channels_last else z
        x = x.reshape(x.shape[0], self.channels, *spatial_shape(x.shape[1:]))  # (B, C, *shape)
        shape = x.shape[2:]
        h, grid, attended = self._tokens(x, cond, mask)  # (B, N, W)
        e = self.embedding(self._token_clocks(clocks, shape, math.prod(grid)), cond.vector)
        e = e[:, None] if e.ndim == 2 else e  # (B, 1 or N, E)
        h = self._run_blocks(h, e, grid, cond, attended)
        shift, scale = self.modulation(e).chunk(2, dim=-1)
        h = self.z_out(modulate(norm(h), shift, scale))  # (B, N, C P)
        x = unpatchify(h, grid, self.patch, shape)
        return (x.movedim(1, -1) if self.channels_last else x).reshape(z.shape)

    def _tokens(self, x: Tensor, cond: Cond, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        attended = None
        if mask is not None:
            mask = mask.reshape(-1, 1, *x.shape[2:])
            x = torch.where(mask, x, 0)
            attended = patchify(mask.to(torch.uint8), self.patch)[0].sum(-1) > 0  # (B, N)
        h, grid = patchify(add_concat(x, cond.concat, self.concat), self.patch)
        h = self.z_in(h)
        if self.places is not None:
            assert all(n <= limit for n, limit in zip(grid, self.places.shape, strict=False)), (
                f"too few learned positions for the grid {grid}"
            )
            positions = self.places[tuple(slice(n) for n in grid)].flatten(0, -2)
            h = h + positions.to(h.dtype)
        return h, grid, attended

    def _token_clocks(self, clocks: Tensor, shape: Sequence[int], count: int) -> Tensor:
        if clocks.ndim == 2 or clocks.shape[1] == count:
            return clocks
        first = tuple(slice(None, None, p) for p in self.patch)
        return clocks.reshape(clocks.shape[0], *shape, -1)[(slice(None), *first)].flatten(1, -2)

    def _run_blocks(self, h: Tensor, e: Tensor, grid: Sequence[int], cond: Cond, attended: Tensor | None) -> Tensor:
        angles = rotary_angles(grid, self.head_dim, self.theta, h.device) if self.theta else None
        cond_length = 0 if cond.tokens is None else cond.tokens.shape[1]
        if cond.tokens is not None:
            assert self.tokens_in is not None, "got condition tokens, but the network was built with token_dim=0"
            e = _join_embedding(e, attended, cond_length)
            attended = _join_mask(cond.mask, attended, h, cond_length)
            h = torch.cat((self.tokens_in(cond.tokens.to(h.dtype)).to(h.dtype), h), dim=1)  # (B, M + N, W)
            angles = None if angles is None else F.pad(angles, (0, 0, cond_length, 0))
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            h = block(h, e, angles, attended, outputs.pop() if block.skip is not None else None)
            if i < len(self.blocks) // 2:
                outputs.append(h)
        return h[:, cond_length:]


def _join_embedding(e: Tensor, attended: Tensor | None, cond_length: int) -> Tensor:
    """Give condition tokens the mean embedding of the latent tokens, if each of those has its own."""
    if e.shape[1] == 1:
        return e
    weight = torch.ones_like(e[..., :1]) if attended is None else attended[..., None].to(e.dtype)
    mean = (e * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return torch.cat((mean.expand(-1, cond_length, -1), e), dim=1)


def _join_mask(cond_mask: Tensor | None, attended: Tensor | None, h: Tensor, cond_length: int) -> Tensor | None:
    """Concatenate the masks of condition tokens (B, M) and latent tokens (B, N); a missing one is all true."""
    if cond_mask is None and attended is None:
        return None
    cond_mask = h.new_ones(h.shape[0], cond_length, dtype=torch.bool) if cond_mask is None else cond_mask
    attended = h.new_ones(h.shape[:2], dtype=torch.bool) if attended is None else attended
    return torch.cat((cond_mask, attended), dim=1)
