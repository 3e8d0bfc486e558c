"""Gaussian mixtures in one dimension, with exact denoiser, marginals and probability flow."""

import math
from dataclasses import dataclass

import torch

from sfumato.core.schedule import append_dims


@dataclass(frozen=True)
class Mixture:
    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _parts(self, level):
        """alpha, and for each component its weight, mean, data variance (K, 1) and variance at the level (K, ...)."""
        column = lambda x: torch.tensor(x, dtype=torch.float64)[:, None]
        data = column(self.stds) ** 2
        return level.alpha, column(self.weights), column(self.means), data, level.alpha**2 * data + level.sigma**2

    def denoise(self, z, level):
        """The exact E[z_0 | z_t], for a level of any shape that broadcasts with the leading axes of z."""
        level = level.map(lambda value: append_dims(value, z).expand_as(z).flatten())
        alpha, weight, mean, data, variance = self._parts(level)
        gap = z.double().flatten() - alpha * mean  # (K, M) for M elements
        posterior = torch.softmax(weight.log() - variance.log() / 2 - gap**2 / (2 * variance), 0)
        return (posterior * (mean + alpha * data / variance * gap)).sum(0).reshape(z.shape).to(z.dtype)

    def cdf(self, schedule, t, z):
        alpha, weight, mean, _, variance = self._parts(schedule(t))
        return (weight * torch.special.ndtr((z[None] - alpha * mean) / variance.sqrt())).sum(0)

    def flow(self, schedule, t, s, z):
        """The probability flow from z at time t to time s: in one dimension it preserves quantiles."""
        target = self.cdf(schedule, t, z)
        low, high = torch.full_like(z, -400.0), torch.full_like(z, 400.0)
        for _ in range(90):
            middle = (low + high) / 2
            below = self.cdf(schedule, s, middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def moments(self, schedule, t):
        """Mean and variance of z_t."""
        alpha, weight, mean, _, variance = self._parts(schedule(t))
        centre = float((weight * alpha * mean).sum())
        return centre, float((weight * (variance + (alpha * mean - centre) ** 2)).sum())

    def conditional_moments(self, schedule, t, s, z):
        """Mean and variance of z_s given z_t = z, the exact result of the reverse process."""
        alpha, weight, mean, _, variance = self._parts(schedule(t))
        alpha_s, _, _, _, variance_s = self._parts(schedule(s))
        shared = alpha / alpha_s * variance_s  # covariance of z_t and z_s
        gap = z - alpha * mean
        posterior = torch.softmax(weight.log() - variance.log() / 2 - gap**2 / (2 * variance), 0)
        means, rest = alpha_s * mean + shared / variance * gap, variance_s - shared**2 / variance
        centre = float((posterior * means).sum())
        return centre, float((posterior * (rest + (means - centre) ** 2)).sum())

    def sample(self, n, generator):
        component = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=generator)
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        return torch.tensor(self.means, dtype=torch.float64)[component] + torch.tensor(self.stds)[component] * noise


GAUSSIAN = Mixture((1.0,), (0.4,), (0.7,))
TWO_MODES = Mixture((0.35, 0.65), (-1.2, 0.7), (0.3, 0.4))  # asymmetric and nonlinear enough to expose errors


def order(steps, errors):
    """The least-squares slope of log error against log step size."""
    x = [-math.log(n) for n in steps]
    y = [math.log(e) for e in errors]
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)
