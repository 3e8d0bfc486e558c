"""A residual MLP on the flattened latent: for small latents the fastest network on a CPU."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nn.layers import Embedding, add_concat, channel_count, modulate, norm, spatial_shape, zero_init
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
        latent_shape: Shape of a latent, (C, *grid) or (D,).
        cond_dim: Length of `Cond.vector`; 0 for none.
        width: Channels W of the residual stream.
        depth: Number of blocks.
        expansion: Hidden width of a block as a multiple of W.
        embedding_dim: Length E of the embedding of clocks and condition.
        swiglu: Use SwiGLU blocks.
        clocks: Number K of clocks (time inputs).
        segments: Number N of segments with their own clocks (B, N, K); clocks (B, K) apply to all segments.
        concat: Channels of `Cond.concat`.
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
        segments: int = 1,
        concat: int = 0,
    ) -> None:
        super().__init__()
        self.depth, self.segments, self.concat = depth, segments, concat
        size, positions = math.prod(latent_shape), math.prod(spatial_shape(latent_shape))
        self.channels = channel_count(latent_shape)
        self.embedding = Embedding(embedding_dim, clocks * segments, cond_dim)
        self.modulation = zero_init(nn.Linear(embedding_dim, (3 * depth + 2) * width))
        self.z_in = nn.Linear(size + concat * positions, width)
        self.blocks = nn.ModuleList(MLPBlock(width, expansion, swiglu) for _ in range(depth))
        self.z_out = zero_init(nn.Linear(width, size))

    def forward(self, z: Tensor, clocks: Tensor, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """Map latents to an output of the same shape.

        Args:
            z: Latents (B, *latent_shape).
            clocks: Clocks (B, K), or (B, N, K) with N = `segments`.
            cond: The condition: `vector` (B, cond_dim) and `concat` (B, concat, *grid); tokens are not supported.
            mask: (B, N), true where a grid position has data; other positions are read as zeros.
        """
        cond = cond or Cond()
        assert cond.tokens is None, "ResMLP does not support condition tokens"
        e = self.embedding(self._flat_clocks(clocks), cond.vector)  # (B, E)
        *modulations, shift, scale = self.modulation(e).chunk(3 * self.depth + 2, dim=-1)  # (B, W) each
        x = self.z_in(self._flat_input(z, cond.concat, mask))  # (B, W)
        for i, block in enumerate(self.blocks):
            x = block(x, *modulations[3 * i : 3 * i + 3])
        return self.z_out(modulate(norm(x), shift, scale)).reshape(z.shape)

    def _flat_clocks(self, clocks: Tensor) -> Tensor:
        if clocks.ndim == 2:
            clocks = clocks[:, None].expand(-1, self.segments, -1)
        assert clocks.shape[1] == self.segments, f"got clocks for {clocks.shape[1]} segments, not {self.segments}"
        return clocks.flatten(1)  # (B, N K)

    def _flat_input(self, z: Tensor, concat: Tensor | None, mask: Tensor | None) -> Tensor:
        grid = z.shape[2:] if z.ndim > 2 else z.shape[1:]
        z = z.reshape(z.shape[0], self.channels, *grid)
        if mask is not None:
            z = torch.where(mask.reshape(-1, 1, *grid), z, 0)
        return add_concat(z, concat, self.concat).flatten(1)
