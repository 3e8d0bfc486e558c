r"""The training objective: a weight w(lambda) on $\|\hat z - z\|^2$ and, chosen separately, a density of times.

The loss is computed on the network's output as $w \, c_{out}^2 \, \|F - target\|^2$, which is equal; so a weight means
the same for every prediction F.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sfumato.core.denoiser import Denoiser
from sfumato.core.schedule import NoiseLevel, Schedule, append_dims_as
from sfumato.registry import build
from sfumato.types import Cond, Latent

LossWeight = Callable[[Tensor], Tensor]

LOGSNR_LIMIT = 40.0  # largest |log-SNR| that is weighted: a weight e^lambda at t = 0 must be finite in float32


def uniform(logsnr: Tensor) -> Tensor:
    r"""Weight 1 on the flow eps - z: $w = (1 + e^{\lambda/2})^2$, the flow-matching loss."""
    return (1 + torch.exp(logsnr / 2)) ** 2


def edm(logsnr: Tensor) -> Tensor:
    r"""Weight 1 on v, $w = 1 + e^\lambda$ (Karras et al., https://arxiv.org/abs/2206.00364, table 1)."""
    return 1 + torch.exp(logsnr)


@dataclass(frozen=True)
class MinSNR:
    r"""$w = \min(e^\lambda, \gamma)$.

    References:
        Hang et al., Efficient Diffusion Training via Min-SNR Weighting, https://arxiv.org/abs/2303.09556 (eq. 8).
    """

    gamma: float = 5.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        return torch.exp(logsnr).clamp_max(self.gamma)


@dataclass(frozen=True)
class Sigmoid:
    r"""Weight sigmoid(bias - lambda) on eps: $w = e^\lambda \, sigmoid(b - \lambda)$.

    References:
        Hoogeboom et al., Simpler Diffusion (SiD2), https://arxiv.org/abs/2410.19324 (section 3).
    """

    bias: float = 0.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        return torch.exp(logsnr) * torch.sigmoid(self.bias - logsnr)


class Learned(nn.Module):
    r"""Weight `uniform` with a learned log variance u of the loss, which becomes $e^{-u} loss + u$.

    u(lambda) is linear in Fourier features and starts at 0 (no change).

    Args:
        features: Number of frequencies.

    References:
        Karras et al., EDM2, https://arxiv.org/abs/2312.02696 (eq. 14 to 16, appendix B.2).
    """

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.out = nn.Linear(2 * features, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, logsnr: Tensor) -> Tensor:
        return uniform(logsnr)

    def uncertainty(self, logsnr: Tensor) -> Tensor:
        """u, in the shape of logsnr."""
        frequencies = torch.arange(1, self.out.in_features // 2 + 1, dtype=logsnr.dtype)
        phase = torch.atan(logsnr / 4)[..., None] * frequencies  # atan maps the log-SNR to +-pi/2
        features = torch.cat([phase.cos(), phase.sin()], -1)
        return self.out(features.to(self.out.weight)).squeeze(-1)


class TimeSampling(nn.Module):
    """A density of times, given by its quantile function: u ~ U(0, 1) -> t."""

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Times t in the shape of u, float64."""
        raise NotImplementedError

    def importance_weight(self, t: Tensor) -> Tensor | None:
        """The importance weight of the loss at t, if the density should reduce variance only; None for no weight."""
        return None

    def update_with_losses(self, t: Tensor, loss: Tensor) -> None:
        """Record the losses at times t, both (B,) or (B, S)."""


def _normal(u: Tensor) -> Tensor:
    """Quantiles of N(0, 1)."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12))


class UniformTime(TimeSampling):
    """Uniform times."""

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


class LogitNormal(TimeSampling):
    r"""$t = sigmoid(x)$, $x \sim N(mean, std^2)$: more times in the middle.

    References:
        Esser et al., Scaling Rectified Flow Transformers, https://arxiv.org/abs/2403.03206 (eq. 19).
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal(u))


class LogNormal(LogitNormal):
    r"""$\log(\sigma / \alpha) \sim N(mean, std^2)$ for every schedule.

    The defaults are EDM's, converted to data of unit variance ($-1.2 + \log 2$ for its $\sigma_{data} = 0.5$).

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (table 1).
    """

    def __init__(self, mean: float = -0.5, std: float = 1.2) -> None:
        super().__init__(mean, std)

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.inverse_logsnr(-2 * (self.mean + self.std * _normal(u)))


class Adaptive(TimeSampling):
    r"""Importance sampling: density $\propto \sqrt{E[loss^2 | t]}$ in bins of t, with an importance weight on the loss.

    The expected gradient equals that of uniform times; its variance is lower. Uniform until every bin has a loss. With
    several processes pass the gathered losses to `observe`; otherwise their densities differ.

    Args:
        bins: Number of bins.
        decay: Decay per observation of the moving average of squared losses in a bin.
        floor: Fraction of the density that stays uniform.

    References:
        Nichol and Dhariwal, https://arxiv.org/abs/2102.09672 (section 3.3).
    """

    square: Tensor
    weight: Tensor

    def __init__(self, bins: int = 32, decay: float = 0.98, floor: float = 0.1) -> None:
        super().__init__()
        self.bins, self.decay, self.floor = bins, decay, floor
        self.register_buffer("square", torch.zeros(bins))
        self.register_buffer("weight", torch.zeros(bins))

    def density(self) -> Tensor:
        """The density in each bin (bins,), with mean 1, float64 on the CPU."""
        root = (self.square.double() / self.weight.double().clamp_min(1e-30)).sqrt().cpu()
        density = self.floor + (1 - self.floor) * root / root.mean().clamp_min(1e-30)
        return torch.where((self.weight > 0).all().cpu(), density, 1.0)

    def _bin(self, t: Tensor) -> Tensor:
        return (t * self.bins).long().clamp(0, self.bins - 1).cpu()

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        probability = self.density() / self.bins
        cdf = probability.cumsum(0)  # at the upper edge of each bin
        k = torch.searchsorted(cdf, u).clamp_max(self.bins - 1)
        return (k + 1 - (cdf[k] - u) / probability[k]).clamp(0, self.bins) / self.bins

    def importance_weight(self, t: Tensor) -> Tensor:
        return 1 / self.density()[self._bin(t)]

    @torch.no_grad()
    def update_with_losses(self, t: Tensor, loss: Tensor) -> None:
        unweighted = loss.detach().double().cpu() / self.importance_weight(t)
        k = self._bin(t).flatten()
        count = torch.bincount(k, minlength=self.bins)
        total = torch.zeros(self.bins, dtype=torch.float64).index_add_(0, k, unweighted.flatten() ** 2)
        rate = torch.where(count > 0, 1 - self.decay, 0.0).to(self.square)
        self.square.lerp_((total / count.clamp_min(1)).to(self.square), rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)


LOSS_WEIGHTS: dict[str, Callable[..., LossWeight]] = {
    "uniform": lambda: uniform,
    "edm": lambda: edm,
    "min_snr": MinSNR,
    "sigmoid": Sigmoid,
    "learned": Learned,
}
TIME_SAMPLINGS: dict[str, Callable[..., TimeSampling]] = {
    "uniform": UniformTime,
    "logit_normal": LogitNormal,
    "lognormal": LogNormal,
    "adaptive": Adaptive,
}


def make_weight(name: str, **settings: object) -> LossWeight:
    """Build a loss weight by its name in `LOSS_WEIGHTS` from the arguments of its constructor."""
    return build(LOSS_WEIGHTS, "loss weight", name, settings)


def make_time_sampling(name: str, **settings: object) -> TimeSampling:
    """Build a density of times by its name in `TIME_SAMPLINGS` from the arguments of its constructor."""
    return build(TIME_SAMPLINGS, "time density", name, settings)


class Objective(nn.Module):
    r"""Mean over t of $w(\lambda_t) \, \|\hat z - z\|^2$ per item.

    Args:
        weight: w as a function of lambda, or its name in `LOSS_WEIGHTS`.
        times: The density of t, or its name in `TIME_SAMPLINGS`.

    Raises:
        UserError: Unknown name.
    """

    def __init__(
        self,
        weight: str | LossWeight = "uniform",
        times: str | TimeSampling = "uniform",
    ) -> None:
        super().__init__()
        self.weight = make_weight(weight) if isinstance(weight, str) else weight
        self.times = make_time_sampling(times) if isinstance(times, str) else times

    def sample_times(self, schedule: Schedule, shape: Sequence[int], generator: Generator) -> Tensor:
        """Draw times for a batch, (B,) or (B, S) for S segments, float64 on the CPU.

        The B times are stratified, one in each quantile of the density, in random order, which lowers the variance of
        the loss (Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630, appendix I.1).
        """
        rank = torch.rand(*shape, generator=generator).argsort(0)
        offset = torch.rand(1, *shape[1:], generator=generator, dtype=torch.float64)
        return self.times((rank + offset) / shape[0], schedule)

    def loss(self, denoiser: Denoiser, latent: Latent, cond: Cond | None, level: NoiseLevel, eps: Tensor) -> Tensor:
        """The loss of each item, or of each of its segments: a mean over valid positions.

        Args:
            denoiser: The `Denoiser`.
            latent: Clean latents (B, ...).
            cond: The condition.
            level: Noise levels (B,), or (B, S) for the segments of the denoiser.
            eps: Standard normal noise in the shape of z.

        Returns:
            In the shape of the level, float32.
        """
        z = latent.z.to(eps.dtype)  # the cache may store bf16
        level = denoiser.segments.spread(level)
        z_t = level.add_noise(z, eps)
        f = denoiser.network_output(z_t, level, cond, latent.mask)
        weight = self.weight(level.logsnr.clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT))
        error = denoiser.prediction.loss(f, z, eps, z_t, level, weight)
        return denoiser.segments.mean(self._corrected(error, level), latent.mask)

    def _corrected(self, error: Tensor, level: NoiseLevel) -> Tensor:
        """Weighted errors (B, ...) under the learned uncertainty and the importance weight of their times."""
        if isinstance(self.weight, Learned):
            u = append_dims_as(self.weight.uncertainty(level.logsnr), error)
            error = error * torch.exp(-u) + u
        correction = self.times.importance_weight(level.t)
        return error if correction is None else append_dims_as(correction, error) * error

    def update_with_losses(self, t: Tensor, loss: Tensor) -> None:
        """Update adaptive times with the losses at t, both (B,) or (B, S), after a step."""
        self.times.update_with_losses(t, loss)
