"""A residual MLP on the flattened latent: for small latents the fastest network on a CPU."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.layers import (
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


class MLPBlock(nn.Module):
    """x + gate * W_2 silu(W_1 h), h = norm(x) (1 + scale) + shift; with SwiGLU x + gate * W_2 (silu(W_1 h) * W_3 h).

    Products learn interactions, such as that of day and month, faster than sums. A SwiGLU block has about as many
    parameters, because its hidden width is two thirds.

    Args:
        width: Channels W.
        expansion: Hidden width as a multiple of W.
        swiglu: Use SwiGLU.

    References:
        Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202 (eq. 6, SwiGLU).
    """

    def __init__(self, width: int, expansion: float = 1.0, swiglu: bool = False) -> None:
        super().__init__()
        hidden = int(width * expansion)
        if swiglu:
            hidden = max(16, 2 * hidden // 3 // 16 * 16)  # a multiple of 16 fills vector registers
        self.swiglu = swiglu
        self.up = nn.Linear(width, (1 + swiglu) * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Map x (B, W), modulated by shift, scale and gate (B, W)."""
        h = self.up(modulate(norm(x), shift, scale))
        if self.swiglu:
            h, factor = h.chunk(2, -1)
            h = F.silu(h) * factor
        else:
            h = F.silu(h)
        return torch.addcmul(x, gate, self.down(h))


class ResMLP(nn.Module):
    """Residual MLP with adaLN-zero, on latents of any shape flattened to one vector.

    The modulation of all blocks is a single linear map of a small embedding: one matrix product instead of `depth`
    small ones. It takes 3 E / (3 E + 2 expansion W) of the operations, so the embedding dimension E is small.

    Args:
        latent_shape: Shape of a latent: (C, *grid), (N, D) with `channels_last`, or (D,).
        cond_dim: Length of `Cond.vector`; 0 for none.
        width: Channels W of the residual stream.
        depth: Number of blocks.
        expansion: Hidden width of a block as a multiple of W.
        embedding_dim: Length E of the embedding of clocks and condition.
        swiglu: Use SwiGLU blocks.
        clocks: Number K of clocks (time inputs).
        segments: Lengths of the consecutive segments of positions that have clocks of their own; empty for one segment.
        concat: Channels of `Cond.concat`.
        token_dim: Must be 0: condition tokens are not supported.
        channels_last: Whether a latent is tokens (N, D). N is the largest number; fewer are padded with zeros.

    Raises:
        UserError: If `token_dim` is not 0.
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        cond_dim: int = 0,
        *,
        width: int = 1024,
        depth: int = 6,
        expansion: float = 1.0,
        embedding_dim: int = 128,
        swiglu: bool = False,
        clocks: int = 1,
        segments: Sequence[int] = (),
        concat: int = 0,
        token_dim: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if token_dim:
            raise UserError("network 'mlp' cannot take text or other token conditions; use dit or unet")
        self.depth, self.concat, self.channels_last = depth, concat, channels_last
        self.channels, self.grid = channels_and_grid(latent_shape, channels_last)
        self.starts = [0, *accumulate(segments[:-1])]  # first position of each segment
        size, positions = math.prod(latent_shape), math.prod(self.grid)
        self.embedding = Embedding(embedding_dim, clocks * len(self.starts), cond_dim)
        self.modulation = zero_init(nn.Linear(embedding_dim, (3 * depth + 2) * width))
        self.z_in = nn.Linear(size + concat * positions, width)
        self.blocks = nn.ModuleList(MLPBlock(width, expansion, swiglu) for _ in range(depth))
        self.z_out = zero_init(nn.Linear(width, size))

    def forward(self, z: Tensor, clocks: Tensor, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """Map latents to an output of the same shape.

        Args:
            z: Latents (B, *latent_shape), or fewer tokens.
            clocks: Clocks (B, K), or (B, N, K) for each position; a segment takes those of its first position.
            cond: The condition: `vector` (B, cond_dim) and `concat` (B, concat, *grid), always channels first.
            mask: (B, N), true where a position has data; other positions are read as zeros.
        """
        cond = cond or Cond()
        assert cond.tokens is None, "ResMLP does not support condition tokens"
        e = self.embedding(self._flat_clocks(clocks), cond.vector)  # (B, E)
        *modulations, shift, scale = self.modulation(e).chunk(3 * self.depth + 2, dim=-1)  # (B, W) each
        x = add_concat(to_grid(z, self.channels_last), cond.concat, self.concat, mask)  # (B, C, *grid)
        x = self.z_in(self._pad(x).flatten(1))  # (B, W)
        for i, block in enumerate(self.blocks):
            x = block(x, *modulations[3 * i : 3 * i + 3])
        h = self.z_out(modulate(norm(x), shift, scale)).unflatten(1, (self.channels, *self.grid))
        return from_grid(h[..., : z.shape[1]] if self.channels_last else h, z.shape, self.channels_last)

    def _flat_clocks(self, clocks: Tensor) -> Tensor:
        """The clocks of all S segments (B, K S), those of the first clock first."""
        if clocks.ndim == 2:
            return clocks[..., None].expand(-1, -1, len(self.starts)).flatten(1)
        assert clocks.shape[1] > self.starts[-1], f"got clocks for {clocks.shape[1]} positions, fewer than the segments"
        return torch.stack([clocks[:, start] for start in self.starts], -1).flatten(1)

    def _pad(self, x: Tensor) -> Tensor:
        """Pad tokens x (B, D, n) with zeros up to the largest number N; other latents stay as they are."""
        if not self.channels_last:
            return x
        missing = self.grid[-1] - x.shape[-1]
        assert missing >= 0, f"got {x.shape[-1]} tokens, but the network was built for at most {self.grid[-1]}"
        return F.pad(x, (0, missing)) if missing else x
