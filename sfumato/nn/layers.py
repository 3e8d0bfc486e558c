"""Layers that networks and codecs share: embeddings, modulation, attention, feed-forward, convolutions.

Every normalisation here is `F.layer_norm` or `F.group_norm`: on CPU torch has one fused kernel for each of them,
while `F.rms_norm` is composed of many (512 x 1024 bf16, forward and backward: 0.5 ms against 6.0 ms).
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def zero_init(layer: Layer) -> Layer:
    """Set weight and bias to zero, so that a residual branch starts at zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def channels_and_grid(latent_shape: Sequence[int], channels_last: bool = False) -> tuple[int, tuple[int, ...]]:
    """The channels C and the grid of a latent (C, *grid), or of tokens (N, D): D channels on N positions.

    A vector (D,) is one channel on a grid of D positions.

    Args:
        latent_shape: Shape of a latent.
        channels_last: Whether the latent is tokens.
    """
    if len(latent_shape) == 1:
        return 1, (latent_shape[0],)
    if channels_last:
        return latent_shape[-1], tuple(latent_shape[:-1])
    return latent_shape[0], tuple(latent_shape[1:])


def to_grid(z: Tensor, channels_last: bool) -> Tensor:
    """Latents as (B, C, *grid) (see `channels_and_grid`): vectors (B, D), grids, or, with `channels_last`, tokens."""
    if z.ndim == 2:
        return z[:, None]
    return z.movedim(-1, 1) if channels_last else z


def from_grid(h: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The inverse of `to_grid`: h (B, C, *grid) as latents of the shape that `to_grid` took."""
    return (h.movedim(1, -1) if channels_last else h).reshape(shape)


def add_concat(x: Tensor, concat: Tensor | None, channels: int, mask: Tensor | None = None) -> Tensor:
    """Append the `channels` of `Cond.concat` to x (B, C, *grid), or as many zeros where there is none.

    The result is zero at the positions where the mask (B, N) is false.
    """
    assert channels or concat is None, "got condition channels, but the network was built with concat=0"
    if channels:
        concat = x.new_zeros(len(x), channels, *x.shape[2:]) if concat is None else concat
        x = torch.cat((x, concat.to(x.dtype)), dim=1)
    return x if mask is None else torch.where(mask.reshape(-1, 1, *x.shape[2:]), x, 0)


def fourier(clocks: Tensor, frequencies: Tensor) -> Tensor:
    r"""Fourier features sqrt(2) [cos(w_i c), sin(w_i c)] of every clock, in float32.

    Args:
        clocks: Clocks c (time inputs), shape (..., K).
        frequencies: Angular frequencies w, shape (n,).

    Returns:
        Features of shape (..., K * 2n).
    """
    angle = clocks.float()[..., None] * frequencies.float()  # (..., K, n)
    return math.sqrt(2) * torch.cat((angle.cos(), angle.sin()), dim=-1).flatten(-2)


class Embedding(nn.Module):
    r"""Embeds clocks and the condition vector in the vector that modulates all blocks.

    .. math:: e = silu(W_2 silu(W_1 fourier(c) + W_c v))

    The frequencies have periods from 12 to 0.2, which suit clocks log(sigma/alpha)/4 in about [-4, 4].

    Args:
        width: Length E of the embedding.
        clocks: Number K of clocks (times the number of segments, if a network flattens those).
        cond_dim: Length of the condition vector; 0 for none.
        features: Number n of frequencies per clock.
    """

    frequencies: Tensor

    def __init__(self, width: int, clocks: int = 1, cond_dim: int = 0, features: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(math.log10(0.5), math.log10(32), features), persistent=False)
        self.clock_in = nn.Linear(2 * features * clocks, width)
        self.vector_in = nn.Linear(cond_dim, width, bias=False) if cond_dim else None
        self.out = nn.Linear(width, width)

    def forward(self, clocks: Tensor, vector: Tensor | None = None) -> Tensor:
        """Embed clocks (B, K) or (B, N, K) and a vector (B, cond_dim) as (B, E) or (B, N, E)."""
        e = self.clock_in(fourier(clocks, self.frequencies))
        if vector is not None:
            assert self.vector_in is not None, "got a condition vector, but the network was built with cond_dim=0"
            v = self.vector_in(vector)
            e = e + (v if e.ndim == 2 else v[:, None])
        return F.silu(self.out(F.silu(e)))


def pad_clock_weights(weights: dict[str, Tensor], clocks: int) -> dict[str, Tensor]:
    """Pad the weights of a network with one clock for a network with more clocks; the new inputs get weight zero."""
    name = "embedding.clock_in.weight"
    return {**weights, name: F.pad(weights[name], (0, (clocks - 1) * weights[name].shape[1]))}


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The modulation of adaLN, h (1 + scale) + shift (Peebles and Xie 2023, arXiv:2212.09748)."""
    return torch.addcmul(shift, h, 1 + scale)


def norm(h: Tensor) -> Tensor:
    """Layer norm over the last axis, without weights (the modulation that follows has scale and shift)."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


class QKNorm(nn.Module):
    """Layer norm with a learned scale and no bias, for queries and keys (ViT-22B, arXiv:2302.05442, section 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, h: Tensor) -> Tensor:
        """Normalise h (..., dim)."""
        return F.layer_norm(h, h.shape[-1:], self.weight.to(h.dtype), eps=1e-6)


def rotary_angles(grid: Sequence[int], head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Axial rotary angles: each axis of the grid rotates an equal part of the pairs (RoFormer, arXiv:2104.09864).

    Args:
        grid: Size of the grid of tokens, one to three axes.
        head_dim: Channels of a head; its head_dim // 2 pairs are divided among the axes, the remainder has angle 0.
        theta: Ratio of the highest frequency (one radian per token) to the lowest.
        device: Device of the result.

    Returns:
        Angles in float32, shape (N, head_dim // 2) with N the number of tokens.
    """
    pairs = head_dim // 2 // len(grid)
    frequencies = theta ** -(torch.arange(pairs, device=device, dtype=torch.float32) / max(pairs, 1))
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # (N, axes)
    angles = (positions[..., None] * frequencies).flatten(1)  # (N, axes * pairs)
    return F.pad(angles, (0, head_dim // 2 - angles.shape[1]))


def rotate(h: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (h_i, h_{i + d/2}) of h (B, heads, N, d) by angles (N, d/2)."""
    cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
    a, b = h.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attention_mask(mask: Tensor) -> Tensor:
    """A mask of tokens (B, N) as attention takes it, (B, 1, 1, N).

    An item whose mask is all false may attend to everything, because a softmax over nothing is not a number.
    """
    return (mask | ~mask.any(1, keepdim=True))[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys and optional rotary positions.

    Args:
        width: Channels W.
        heads: Number of heads; must divide W.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0 and (width // heads) % 2 == 0, f"{heads} heads do not split {width} channels in pairs"
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = QKNorm(width // heads), QKNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, angles: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Self-attention among tokens.

        Args:
            h: Tokens (B, N, W).
            angles: Rotary angles (N, W / heads / 2), or None.
            mask: (B, N), true where a token may be attended to, or None.

        Returns:
            Tokens (B, N, W).
        """
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else attention_mask(mask))
        return self.out(h.transpose(1, 2).flatten(2))  # (B, N, W)


class CrossAttention(nn.Module):
    """Multi-head attention to condition tokens, with normalised queries and keys; its output starts at zero.

    Args:
        width: Channels W.
        heads: Number of heads; must divide W.
        token_dim: Length D of a condition token.
    """

    def __init__(self, width: int, heads: int, token_dim: int) -> None:
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not split {width} channels"
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(token_dim, 2 * width)
        self.q_norm, self.k_norm = QKNorm(width // heads), QKNorm(width // heads)
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each position reads from the condition tokens.

        Args:
            h: Positions (B, N, W).
            tokens: Condition tokens (B, M, D).
            mask: (B, M), true where a token may be attended to, or None. An item with none gets exactly zero.

        Returns:
            (B, N, W).
        """
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k, v = self.kv(tokens.to(h.dtype)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else attention_mask(mask))
        h = self.out(h.transpose(1, 2).flatten(2))  # (B, N, W)
        return h if mask is None else torch.where(mask.any(1)[:, None, None], h, 0)


class FeedForward(nn.Module):
    """Two-layer perceptron with GELU or SwiGLU (arXiv:2002.05202; with 2/3 of the hidden width).

    Args:
        width: Channels W in and out.
        expansion: Hidden width as a multiple of W.
        swiglu: Use SwiGLU instead of GELU; the number of parameters stays about the same.
    """

    def __init__(self, width: int, expansion: float = 4.0, swiglu: bool = True) -> None:
        super().__init__()
        hidden = int(width * expansion)
        # a multiple of 16 keeps the matrix kernels on their fast path
        hidden = max(16, round(hidden * 2 / 3 / 16) * 16) if swiglu else hidden
        self.swiglu = swiglu
        self.up = nn.Linear(width, hidden * (2 if swiglu else 1))
        self.down = nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        """Map tokens (..., W) to (..., W)."""
        h = self.up(h)
        if self.swiglu:
            a, b = h.chunk(2, dim=-1)
            return self.down(F.silu(a) * b)
        return self.down(F.gelu(h))
