r"""Noise schedules: the coefficients of z_t = alpha_t z + sigma_t eps.

Time runs from 0 (data) to 1 (noise). All results are float64 on the CPU, in the shape of t; cast them afterwards.
Everything at one time is one value, the `NoiseLevel` that a schedule returns: computed once, then handed on.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.registry import build

COEFFICIENT_FLOOR = 1e-20  # smallest alpha and sigma of a noise level, so that quotients and logarithms stay finite


class NoiseLevel(NamedTuple):
    r"""The schedule at one time, float64 on the CPU.

    Attributes:
        t: The time: a scalar for a whole batch, (B,) for each item, or (B, N) or (1, N) for each position.
        alpha: The coefficient of the data, in the shape of t, above zero.
        sigma: The coefficient of the noise, in the shape of t, above zero.
        logsnr: The log signal-to-noise ratio $\lambda = \log(\alpha^2 / \sigma^2)$, finite everywhere.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    logsnr: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "NoiseLevel":
        """The level with a function of shapes, such as indexing, applied to all four values."""
        return NoiseLevel(*map(function, self))

    def add_noise(self, z: Tensor, eps: Tensor) -> Tensor:
        r"""$z_t = \alpha_t z + \sigma_t \epsilon$, in the dtype of z."""
        return append_dims_as(self.alpha, z) * z + append_dims_as(self.sigma, z) * eps


def append_dims(value: Tensor, like: Tensor) -> Tensor:
    """Append axes of size 1 up to `like.ndim`, on its device: (B,) or (B, N) -> (B, 1, ...) or (B, N, 1, ...).

    A scalar stays as it is: it broadcasts with any shape and promotes neither dtype nor device.
    """
    return value if value.ndim == 0 else value.to(like.device).reshape(value.shape + (1,) * (like.ndim - value.ndim))


def append_dims_as(value: Tensor, like: Tensor) -> Tensor:
    """`append_dims` after a cast to the dtype of `like`."""
    return value if value.ndim == 0 else append_dims(value.to(like.dtype), like)


def masked_mean(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of each item (B,) of elements (B, ...); of tokens (B, N, D) over the positions of a mask (B, N)."""
    if mask is None:
        return value.flatten(1).mean(1)
    value = torch.where(mask, value.mean(2), 0)  # (B, N)
    return value.sum(1) / mask.sum(1).clamp_min(1)


@dataclass(frozen=True)
class Segments:
    """Consecutive segments of the positions of a latent (B, N, ...), such as an image and its text.

    Marginal, conditional and joint sampling of a joint model differ only in the times of its segments.

    Args:
        lengths: Positions of each segment; empty if the latent has one time.

    References:
        Bao et al., UniDiffuser, https://arxiv.org/abs/2303.06555 (section 3.2).
    """

    lengths: tuple[int, ...] = ()

    @property
    def index(self) -> Tensor:
        """The segment of every position (N,)."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    def positions(self, segments: Sequence[int]) -> Tensor:
        """Whether each position is in one of these segments (N,), bool."""
        return torch.isin(self.index, torch.tensor(segments))

    def grid(self, grid: Tensor, given: Sequence[int]) -> Tensor:
        """Times (steps + 1, 1, S): the given segments stay at t = 0, the others follow a grid (steps + 1,)."""
        times = grid[:, None, None].repeat(1, 1, len(self.lengths))
        times[..., list(given)] = 0
        return times

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of the times of a batch: (B,), or (B, S) for S segments."""
        return (batch, len(self.lengths)) if self.lengths else (batch,)

    def spread(self, level: NoiseLevel) -> NoiseLevel:
        """A level of every segment (B, S) as one of every position (B, N); other levels stay as they are."""
        if not self.lengths or level.t.ndim < 2:
            return level
        assert level.t.shape[-1] == len(self.lengths), (level.t.shape, self.lengths)
        return level.map(lambda value: value[..., self.index])

    def mean(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of elements (B, ...) over each segment (B, S), or over each item (B,) without segments."""
        if not self.lengths:
            return masked_mean(value, mask)
        parts = torch.split(value, list(self.lengths), 1)
        masks = [None for _ in parts] if mask is None else torch.split(mask, list(self.lengths), 1)
        return torch.stack([masked_mean(*pair) for pair in zip(parts, masks, strict=True)], 1)


def as_time(t: Tensor | float) -> Tensor:
    """A time as a float64 tensor on the CPU, clamped to [0, 1]."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").clamp(0.0, 1.0)


def _double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor | float) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        t = as_time(t).clone().requires_grad_()
        (slope,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)
    return slope


class Schedule(ABC):
    r"""A path from data to noise, $z_t = \alpha_t z + \sigma_t \epsilon$, $t \in [0, 1]$."""

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """The coefficient of the data at time t (any shape)."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """The coefficient of the noise at time t (any shape)."""

    @abstractmethod
    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        """The time at which the log signal-to-noise ratio has this value, or the nearest value that it reaches."""

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        """The noise level at time t (any shape)."""
        t = as_time(t)
        alpha, sigma = self.alpha(t).clamp_min(COEFFICIENT_FLOOR), self.sigma(t).clamp_min(COEFFICIENT_FLOOR)
        return NoiseLevel(t, alpha, sigma, 2 * (alpha.log() - sigma.log()))

    def levels(self, grid: Tensor) -> list[NoiseLevel]:
        """The noise levels of a time grid (steps + 1, ...), in its order."""
        return [self(t) for t in grid]

    def dalpha(self, t: Tensor | float) -> Tensor:
        """The time derivative of alpha."""
        return _derivative(self.alpha, t)

    def dsigma(self, t: Tensor | float) -> Tensor:
        """The time derivative of sigma."""
        return _derivative(self.sigma, t)

    def settings(self) -> dict[str, object]:
        """The arguments that make `make_schedule(**settings)` build it again; JSON-serializable."""
        name = next(name for name, cls in SCHEDULES.items() if cls is type(self))
        return {"name": name, **asdict(self)}  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(frozen=True)
class Flow(Schedule):
    r"""The straight path $\alpha = 1 - t$, $\sigma = t$ (flow matching, rectified flow).

    References:
        Lipman et al., Flow Matching for Generative Modeling, https://arxiv.org/abs/2210.02747 (eq. 20).
    """

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t)

    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        return torch.sigmoid(-_double(logsnr) / 2)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""The quarter circle $\alpha = \cos(\pi t / 2)$, $\sigma = \sin(\pi t / 2)$.

    References:
        Nichol and Dhariwal, Improved DDPM, https://arxiv.org/abs/2102.09672 (eq. 17, without the offset).
    """

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(as_time(t) * (math.pi / 2))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sin(as_time(t) * (math.pi / 2))

    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        return torch.atan(torch.exp(-_double(logsnr) / 2)) * (2 / math.pi)


class VariancePreserving(Schedule):
    r"""Schedules with $\alpha^2 + \sigma^2 = 1$, given by the integral of beta, $b(t) = -\log \alpha_t^2$."""

    @abstractmethod
    def integrated_beta(self, t: Tensor) -> Tensor:
        r"""The integral of beta up to t, $b(t) = -\log \alpha_t^2$."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-self.integrated_beta(as_time(t)) / 2)

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integrated_beta(as_time(t))))


@dataclass(frozen=True)
class LinearBeta(VariancePreserving):
    r"""The continuous limit of DDPM's linear betas: $\beta(t)$ rises linearly from beta_min to beta_max.

    Args:
        beta_min: Beta at t = 0.
        beta_max: Beta at t = 1.

    References:
        Song et al., Score-Based Generative Modeling through SDEs, https://arxiv.org/abs/2011.13456 (eq. 33).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def integrated_beta(self, t: Tensor) -> Tensor:
        return t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2

    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        b = torch.nn.functional.softplus(-_double(logsnr))
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return as_time(2 * b / (self.beta_min + root))


@dataclass(frozen=True)
class BetaTable(VariancePreserving):
    r"""A discrete list of betas: $\bar\alpha_k = \prod_{i \le k} (1 - \beta_i)$ at time t = (k + 1) / K, data at t = 0.

    Between two entries beta is constant, so that the path is defined and invertible everywhere.

    Args:
        betas: The K variances, first step first.

    References:
        Ho et al., Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239 (eq. 4).
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta < 1 for beta in self.betas):
            raise UserError("betas of schedule 'table' must be a list of numbers between 0 and 1")
        object.__setattr__(self, "betas", tuple(self.betas))

    @cached_property
    def _cumulative(self) -> Tensor:
        integrals = -torch.log1p(-torch.tensor(self.betas, dtype=torch.float64))  # integral of beta over each step
        return torch.cat([integrals.new_zeros(1), integrals.cumsum(0)])  # (K + 1,)

    def integrated_beta(self, t: Tensor) -> Tensor:
        k = t * len(self.betas)
        below = k.long().clamp_max(len(self.betas) - 1)
        return torch.lerp(self._cumulative[below], self._cumulative[below + 1], k - below)

    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        b = torch.nn.functional.softplus(-_double(logsnr)).clamp_max(self._cumulative[-1])
        k = torch.searchsorted(self._cumulative, b).clamp(1, len(self.betas))
        low, high = self._cumulative[k - 1], self._cumulative[k]
        return (k - 1 + (b - low) / (high - low)) / len(self.betas)


@dataclass(frozen=True)
class EDM(Schedule):
    r"""The variance-exploding path: $\alpha = 1$, and $\sigma^{1/\rho}$ is linear in t from sigma_min to sigma_max.

    A uniform grid in t is then the grid of the paper. (Latents have unit variance: `sigma_data` is 1.)

    Args:
        sigma_min: Noise level at t = 0, small enough to neglect.
        sigma_max: Noise level at t = 1.
        rho: Exponent; a larger one puts more steps near the data.

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
        https://arxiv.org/abs/2206.00364 (eq. 5).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def _root_range(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        low, high = self._root_range
        return (low + as_time(t) * (high - low)) ** self.rho

    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        low, high = self._root_range
        return as_time((torch.exp(-_double(logsnr) / (2 * self.rho)) - low) / (high - low))


@dataclass(frozen=True)
class RandomWalk(Schedule):
    r"""The random walk $z_k = z_{k-1} + \sqrt{\tau} w_k$ of `steps` steps: $\alpha = 1$, $\sigma^2 = t \cdot T \tau$.

    The mean stays constant, the variance grows by tau per step. Step k is at time k / steps.

    Args:
        steps: Number of steps T.
        tau: Variance added per step.
    """

    steps: int = 1000
    tau: float = 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(as_time(t) * (self.steps * self.tau))

    def inverse_logsnr(self, logsnr: Tensor | float) -> Tensor:
        return as_time(torch.exp(-_double(logsnr)) / (self.steps * self.tau))

    def forward_step(self, z: Tensor, w: Tensor) -> Tensor:
        r"""One step towards noise, $z_{k+1} = z_k + \sqrt{\tau} w$."""
        return z + math.sqrt(self.tau) * w

    def reverse_step(self, z: Tensor, score: Tensor, w: Tensor | None = None) -> Tensor:
        r"""One step towards the data, $z_k = z_{k+1} + \tau \nabla \log p(z_{k+1}) + \sqrt{\tau} w$.

        Without w it is the step of the probability flow, with half the score. With a score of zero it is one more
        forward step: subtracting fresh noise adds variance just as adding it does.
        """
        if w is None:
            return z + self.tau / 2 * score
        return z + self.tau * score + math.sqrt(self.tau) * w


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "flow": Flow,
    "cosine": Cosine,
    "linear": LinearBeta,
    "table": BetaTable,
    "edm": EDM,
    "ve": EDM,
    "walk": RandomWalk,
}


def make_schedule(name: str, **settings: object) -> Schedule:
    """Build a schedule by its name in `SCHEDULES` from the arguments of its constructor.

    Raises:
        UserError: The name or a setting is unknown; the nearest one is suggested.
    """
    return build(SCHEDULES, "schedule", name, settings)
