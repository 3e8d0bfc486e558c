"""Likelihoods from the denoising error."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from sfumato.core.denoiser import Denoise
from sfumato.core.schedule import Schedule, append_dims_as

NOISE_FRACTIONS = (0.1, 0.8)  # sigma / (alpha + sigma) at the ends of the integral over the log-SNR
QUADRATURE_POINTS = 8  # midpoints of that integral, each with noise of its own


def _logsnr_range() -> tuple[float, float]:
    """The log-SNR at both `NOISE_FRACTIONS`, the highest first."""
    high, low = (-2 * math.log(fraction / (1 - fraction)) for fraction in NOISE_FRACTIONS)
    return high, low


def noise_prediction_error(denoise: Denoise, schedule: Schedule, z: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """The squared error (B,) in predicting a given noise, at a fraction u (B,) of the way from high to low log-SNR."""
    high, low = _logsnr_range()
    logsnr = high + (low - high) * u
    level = schedule(schedule.inverse_logsnr(logsnr))
    error = (denoise(level.add_noise(z, noise), level) - z) * append_dims_as(torch.exp(logsnr / 2), z)
    return error.square().flatten(1).sum(1)


@torch.no_grad()
def class_log_likelihood_ratio(
    conditional: Denoise, alternatives: Sequence[Denoise], schedule: Schedule, z: Tensor, generator: Generator
) -> Tensor:
    r"""Log-likelihood ratio (B,) in nats of items z (B, ...) under a class against the likeliest alternative.

    The minimum over alternatives r of $\frac{1}{2} \int (\|\hat\epsilon_r - \epsilon\|^2 - \|\hat\epsilon_c -
    \epsilon\|^2) d\lambda$ over the log-SNR: the difference of the bounds of $\log p(z | c)$ and $\log p(z | r)$. All
    items get the same noise, so an item's result does not depend on its batch.

    Args:
        conditional: (z, level) -> z_hat under the class.
        alternatives: The same under other conditions.
        schedule: The noise schedule.
        z: Clean latents (B, ...).
        generator: Draws the noise.

    References:
        Li et al., Your Diffusion Model is Secretly a Zero-Shot Classifier, https://arxiv.org/abs/2303.16203 (eq. 5).
    """
    differences = list[Tensor]()
    for u in (torch.arange(QUADRATURE_POINTS, dtype=torch.float64) + 0.5) / QUADRATURE_POINTS:
        noise = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)
        error, *others = (
            noise_prediction_error(denoise, schedule, z, u.expand(len(z)), noise)
            for denoise in (conditional, *alternatives)
        )
        differences.append(torch.stack(others) - error)
    high, low = _logsnr_range()
    return (high - low) / 2 * torch.stack(differences).mean(0).amin(0)
