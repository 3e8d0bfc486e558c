r"""Noise schedules: the coefficients of z_t = alpha_t z + sigma_t eps.

Time runs from 0 (data) to 1 (noise). All results are float64 on the CPU, in the shape of t; cast them afterwards.
The log signal-to-noise ratio is $\lambda_t = \log(\alpha_t^2 / \sigma_t^2)$, clipped to +-`LOGSNR_LIMIT`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.registry import build

LOGSNR_LIMIT = 40.0  # largest |log-SNR|
_LOG_FLOOR = math.exp(-LOGSNR_LIMIT)  # smallest alpha or sigma in a logarithm; far below exp(-LOGSNR_LIMIT / 2)


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

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Both coefficients, (alpha_t, sigma_t)."""
        return self.alpha(t), self.sigma(t)

    def logsnr(self, t: Tensor | float) -> Tensor:
        r"""The log signal-to-noise ratio $\lambda_t = \log(\alpha_t^2 / \sigma_t^2)$, finite everywhere."""
        alpha, sigma = self(t)
        half_logsnr = alpha.clamp_min(_LOG_FLOOR).log() - sigma.clamp_min(_LOG_FLOOR).log()
        return (2 * half_logsnr).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT)

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
