r"""The training objective: a weight w(lambda) on $\|\hat z - z\|^2$ and, apart from it, a density of times.

The loss is taken on the network's output, $w \, c_{out}^2 \, \|F - target\|^2$, which is the same number; so a weight
means the same whatever F is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from ..choice import build
from ..types import Cond
from .corners import log_chances, surprise
from .denoiser import Denoiser, trail
from .schedule import Schedule

Distance = Callable[[Tensor, Tensor], Tensor]
Weight = Callable[[Tensor], Tensor]


def uniform(logsnr: Tensor) -> Tensor:
    r"""Weight 1 on the flow eps - z: $w = (1 + e^{\lambda/2})^2$, flow matching as it is written."""
    return (1 + torch.exp(logsnr / 2)) ** 2


def edm(logsnr: Tensor) -> Tensor:
    r"""Weight 1 on v, $w = 1 + e^\lambda$: that of Karras et al., https://arxiv.org/abs/2206.00364 (table 1)."""
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
    r"""Weight `uniform`, and the loss becomes $e^{-u} loss + u$: it counts against what is usual at its time.

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
        phase = torch.atan(logsnr / 4)[..., None] * frequencies  # within +-pi/2 per unit of frequency
        features = torch.cat([phase.cos(), phase.sin()], -1)
        return self.out(features.to(self.out.weight)).squeeze(-1)


class Times(nn.Module):
    """A density of times, given by its quantiles: u ~ U(0, 1) -> t."""

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Times t in the shape of u, float64."""
        raise NotImplementedError

    def correction(self, t: Tensor) -> Tensor | None:
        """What the loss at t is multiplied by, where the density is there to lower its variance and not to weigh."""
        return None

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Take note of losses (B,) met at times t (B, ...)."""


def _normal(u: Tensor) -> Tensor:
    """Quantiles of N(0, 1)."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12))


class UniformTimes(Times):
    """All times alike."""

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


class LogitNormal(Times):
    r"""$t = sigmoid(x)$, $x \sim N(mean, std^2)$: more of the middle.

    References:
        Esser et al., Scaling Rectified Flow Transformers, https://arxiv.org/abs/2403.03206 (eq. 19).
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal(u))


class LogNormal(LogitNormal):
    r"""$\log(\sigma / \alpha) \sim N(mean, std^2)$, whatever the schedule.

    The defaults are those of EDM for data of unit variance ($-1.2 + \log 2$ for its $\sigma_{data} = 0.5$).

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (table 1).
    """

    def __init__(self, mean: float = -0.5, std: float = 1.2) -> None:
        super().__init__(mean, std)

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.inverse(-2 * (self.mean + self.std * _normal(u)))


class Adaptive(Times):
    r"""Importance sampling: density $\propto \sqrt{E[loss^2 | t]}$ in bins of t, undone by a factor on the loss.

    The expected gradient stays that of uniform times; its variance falls. Uniform until every bin has been seen. With
    several processes hand `observe` the gathered losses, or each would draw other times.

    Args:
        bins: Number of bins.
        decay: Of the running mean of squared losses in a bin, per observation.
        floor: Share of the density that stays uniform.

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
        """The density in each bin (bins,), of mean 1, float64 on the CPU."""
        root = (self.square.double() / self.weight.double().clamp_min(1e-30)).sqrt().cpu()
        density = self.floor + (1 - self.floor) * root / root.mean().clamp_min(1e-30)
        return torch.where((self.weight > 0).all().cpu(), density, 1.0)

    def _bin(self, t: Tensor) -> Tensor:
        return (t * self.bins).long().clamp(0, self.bins - 1).cpu()

    def forward(self, u: Tensor, schedule: Schedule) -> Tensor:
        density = self.density() / self.bins
        edges = density.cumsum(0)
        k = torch.searchsorted(edges, u).clamp_max(self.bins - 1)
        return (k + 1 - (edges[k] - u) / density[k]).clamp(0, self.bins) / self.bins

    def correction(self, t: Tensor) -> Tensor:
        return 1 / self.density()[self._bin(t)]

    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor) -> None:
        raw = loss.detach().double().cpu().reshape(-1, *(1,) * (t.ndim - 1)) / self.correction(t)
        k = self._bin(t).flatten()
        count = torch.bincount(k, minlength=self.bins)
        total = torch.zeros(self.bins, dtype=torch.float64).index_add_(0, k, raw.flatten() ** 2)
        rate = torch.where(count > 0, 1 - self.decay, 0.0).to(self.square)
        self.square.lerp_((total / count.clamp_min(1)).to(self.square), rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)


WEIGHTS: dict[str, Callable[..., Weight]] = {
    "uniform": lambda: uniform,
    "edm": lambda: edm,
    "min_snr": MinSNR,
    "sigmoid": Sigmoid,
    "learned": Learned,
}
TIMES: dict[str, Callable[..., Times]] = {
    "uniform": UniformTimes,
    "logit_normal": LogitNormal,
    "lognormal": LogNormal,
    "adaptive": Adaptive,
}


def make_weight(name: str, **settings: object) -> Weight:
    """A weight by name, with settings of its constructor."""
    return build(WEIGHTS, "loss weight", name, settings)


def make_times(name: str, **settings: object) -> Times:
    """A density of times by name, with settings of its constructor."""
    return build(TIMES, "time density", name, settings)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """(a - b)^2, element by element."""
    return (a - b) ** 2


def masked_mean(value: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The mean of each item over what its mask says is data.

    Args:
        value: (B, ...).
        mask: (B, N) over the places of channels-first (B, C, \*places), or over the second axis of (B, N, ...).

    Returns:
        (B,)
    """
    if mask is None:
        return value.flatten(1).mean(1)
    places = value.shape[2:] if value.ndim > 2 else value.shape[1:]
    if math.prod(places) == mask.shape[1]:
        value = value.reshape(len(value), -1, mask.shape[1]).mean(1)  # (B, N)
    else:
        value = value.reshape(len(value), mask.shape[1], -1).mean(2)
    return torch.where(mask, value, 0).sum(1) / mask.sum(1).clamp_min(1)


class Objective(nn.Module):
    r"""Mean over t of $w(\lambda_t) \, \|\hat z - z\|^2$ per item.

    Args:
        weight: w as a function of lambda, or its name in `WEIGHTS`.
        times: The density of t, or its name in `TIMES`.
        distance: In place of the square: (z_hat, z) -> elementwise distance, such as a cross-entropy for categories.

    Raises:
        UserError: Unknown name.
    """

    def __init__(
        self, weight: str | Weight = "uniform", times: str | Times = "uniform", distance: Distance | None = None
    ) -> None:
        super().__init__()
        self.weight = make_weight(weight) if isinstance(weight, str) else weight
        self.times = make_times(times) if isinstance(times, str) else times
        self.distance = distance

    def draw(self, schedule: Schedule, shape: Sequence[int], generator: Generator) -> Tensor:
        """Times for a batch, (B,) or (B, N), float64 on the CPU.

        The B draws of a column are spread evenly over the density, in random order (Kingma et al., Variational
        Diffusion Models, https://arxiv.org/abs/2107.00630, appendix I.1), which lowers the variance of the loss.
        """
        rank = torch.rand(*shape, generator=generator).argsort(0)
        offset = torch.rand(1, *shape[1:], generator=generator, dtype=torch.float64)
        return self.times((rank + offset) / shape[0], schedule)

    def loss(
        self,
        denoiser: Denoiser,
        z: Tensor,
        cond: Cond | None,
        mask: Tensor | None,
        t: Tensor,
        eps: Tensor,
    ) -> Tensor:
        """The loss of each item.

        Args:
            denoiser: The `Denoiser`.
            z: Clean latents (B, ...).
            cond: What the network is told.
            mask: (B, N), true where a padded item has data.
            t: Times (B,), or more leading axes of z.
            eps: Standard normal noise in the shape of z.

        Returns:
            (B,), float32.
        """
        z = z.to(eps.dtype)  # a cache may keep it in bf16
        z_t = denoiser.noised(z, eps, t)
        logsnr = denoiser.schedule.logsnr(t)
        weight = self.weight(logsnr)
        if self.distance is None:
            weight = weight * denoiser.coefficients(t, t.ndim)[1] ** 2
            f = denoiser.output(z_t, t, cond, mask)
            error = self._of_categories(squared(f, denoiser.target(z, eps, t)), denoiser, f, z_t, t, z)
        else:
            error = self.distance(denoiser(z_t, t, cond, mask), z)
        return masked_mean(self._weighted(error, weight, logsnr, self.times.correction(t)), mask)

    @staticmethod
    def _of_categories(error: Tensor, denoiser: Denoiser, f: Tensor, z_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Errors (B, D) with twice the cross-entropy where positions are categories: both are -2 log P then."""
        corners = denoiser.corners()
        if corners is None:
            return error
        missed = surprise(corners, log_chances(corners, f, z_t, *denoiser.schedule(t)), z)
        return torch.cat([error[:, : corners.start], 2 * missed], 1)

    def _weighted(self, error: Tensor, weight: Tensor, logsnr: Tensor, correction: Tensor | None) -> Tensor:
        error = trail(weight, error) * error
        if isinstance(self.weight, Learned):
            u = trail(self.weight.uncertainty(logsnr), error)
            error = error * torch.exp(-u) + u
        return error if correction is None else trail(correction, error) * error

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """After a step: let adaptive times learn from the losses (B,) at t."""
        self.times.observe(t, loss)
