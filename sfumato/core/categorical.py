r"""Categorical denoising: posterior probabilities of the levels of a category, and the expectation of z under them.

Level k of a category is the point $z_k = (e_k - p) / s$. Given noisy $z_t = \alpha z + \sigma \epsilon$ its posterior
is $P(k | z_t) \propto p_k \exp(-\|z_t - \alpha z_k\|^2 / 2 \sigma^2) \exp(f_k)$: Bayes' rule for this column alone,
times what the network infers from the other columns. With f = 0 it is the exact denoiser of independent columns.
"""

from functools import cache

import torch
from torch import Tensor

from sfumato.core.schedule import NoiseLevel, append_dims_as
from sfumato.types import CategoricalLayout

SIGMA_FLOOR = 1e-3  # smallest noise level used; the posterior is one-hot by then
PRIOR_FLOOR = 1e-6  # smallest prior probability of a level


@cache
def group_index(widths: tuple[int, ...]) -> Tensor:
    """The group of each position (D,)."""
    return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))


def log_softmax(logits: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Log softmax within each group of logits (B, D).

    Groups are not padded to one width: a single wide group among many narrow ones would multiply the memory.
    """
    group, values = group_index(widths).to(logits.device), logits.detach()
    lowest = values.new_full((len(logits), len(widths)), -torch.inf)
    maximum = lowest.scatter_reduce(1, group.expand_as(values), values, "amax")  # (B, groups)
    logits = logits - maximum.index_select(1, group)
    total = torch.zeros_like(maximum).index_add(1, group, logits.exp())
    return logits - total.log().index_select(1, group)


def log_probabilities(layout: CategoricalLayout, f: Tensor, z_t: Tensor, level: NoiseLevel) -> Tensor:
    """The posterior log P(k | z_t) of every level, (B, D - start).

    Terms of the squared distance that are equal for all levels of a group cancel; only the part of e_k remains.

    Args:
        layout: Positions, prior p and scale s of the categories.
        f: The network's output (B, D).
        z_t: Noisy latents (B, D).
        level: The noise level.
    """
    p, s = layout.mean.to(z_t), layout.std.to(z_t)
    f, z_t = f[:, layout.start :], z_t[:, layout.start :]
    alpha, sigma = level.alpha, level.sigma.clamp_min(SIGMA_FLOOR)
    c_z, c_p = (append_dims_as(c, z_t) for c in (alpha / sigma**2, alpha**2 / sigma**2))
    log_likelihood = c_z * z_t / s + c_p * (p / s**2)
    return log_softmax(f + p.clamp_min(PRIOR_FLOOR).log() + log_likelihood, layout.widths)


def expectation(layout: CategoricalLayout, log_p: Tensor) -> Tensor:
    """The expectation of z over the levels (B, D - start)."""
    return (log_p.exp() - layout.mean.to(log_p)) / layout.std.to(log_p)


def cross_entropy(layout: CategoricalLayout, log_p: Tensor, z: Tensor) -> Tensor:
    """-log P of the true levels in z (B, D), each at its own position (B, D - start); 0 elsewhere."""
    one_hot = (z[:, layout.start :] * layout.std.to(z) + layout.mean.to(z)).round()
    return -one_hot * log_p.clamp_min(-1e4)  # 0 and not NaN where another level is impossible
