r"""Denoising categories: a network says how likely each level is, and the expectation over levels is what it means.

The levels of a group lie at the corners $z_k = (e_k - p) / s$. Of noisy $z_t = \alpha z + \sigma \epsilon$ the chances
are $P(k | z_t) \propto p_k \exp(-\|z_t - \alpha z_k\|^2 / 2 \sigma^2) \exp(f_k)$: what is known without a network,
times what a network finds in the other columns. Its output f = 0 is the exact denoiser of independent columns.
"""

from functools import cache

import torch
from torch import Tensor

from ..types import Corners

SIGMA_MIN = 1e-3  # the noise is never taken for less: the chances are 0 and 1 by then
SHARE_MIN = 1e-6  # likewise the share of a level


@cache
def groups(widths: tuple[int, ...]) -> Tensor:
    """The group of each position (D,)."""
    return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))


def log_softmax(logits: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Log softmax within each group of logits (B, D).

    Nothing is laid out in equal widths: one wide group among many narrow ones would make that many times as large.
    """
    group, known = groups(widths).to(logits.device), logits.detach()
    lowest = known.new_full((len(logits), len(widths)), -torch.inf)
    most = lowest.scatter_reduce(1, group.expand_as(known), known, "amax")  # (B, groups)
    logits = logits - most.index_select(1, group)
    total = torch.zeros_like(most).index_add(1, group, logits.exp())
    return logits - total.log().index_select(1, group)


def log_chances(corners: Corners, f: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Log P(k | z_t) of every level, (B, D - start).

    What is the same for all levels of a group is left out: of the squared distance only the part of e_k stays.

    Args:
        corners: Where the levels lie.
        f: The network's output (B, D).
        z_t: Noisy latents (B, D).
        alpha: (B,), float64.
        sigma: (B,), float64.
    """
    p, s = corners.mean.to(z_t), corners.std.to(z_t)
    f, z_t = f[:, corners.start :], z_t[:, corners.start :]
    sigma = sigma.clamp_min(SIGMA_MIN)
    on_z, on_p = (c.to(z_t)[:, None] for c in (alpha / sigma**2, alpha**2 / sigma**2))
    near = on_z * z_t / s + on_p * (p / s**2)
    return log_softmax(f + p.clamp_min(SHARE_MIN).log() + near, corners.widths)


def expected(corners: Corners, log_chances: Tensor) -> Tensor:
    """The expectation of z over the levels (B, D - start)."""
    return (log_chances.exp() - corners.mean.to(log_chances)) / corners.std.to(log_chances)


def surprise(corners: Corners, log_chances: Tensor, z: Tensor) -> Tensor:
    """-log P of the levels that z (B, D) is at, each at its own position (B, D - start); 0 elsewhere."""
    levels = (z[:, corners.start :] * corners.std.to(z) + corners.mean.to(z)).round()
    return -levels * log_chances.clamp_min(-1e4)  # 0 and not NaN where another level is impossible
