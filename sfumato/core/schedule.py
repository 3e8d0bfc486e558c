r"""Noise schedules: how much of the data and how much noise is in z_t = alpha_t z + sigma_t eps.

Time runs from 0 (data) to 1 (noise). Everything here is float64 on the CPU, in the shape of t; cast afterwards.
The log signal-to-noise ratio is $\lambda_t = \log(\alpha_t^2 / \sigma_t^2)$, clipped to +-`LOGSNR_LIMIT`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..choice import build
from ..errors import UserError

LOGSNR_LIMIT = 40.0
_TINY = math.exp(-LOGSNR_LIMIT)  # far below what the limit needs: keeps logarithms and quotients finite


def time(t: Tensor | float) -> Tensor:
    """Any time as a float64 tensor on the CPU, inside [0, 1]."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").clamp(0.0, 1.0)


def _double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor | float) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        t = time(t).clone().requires_grad_()
        (slope,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)
    return slope


class Schedule(ABC):
    r"""A path from data to noise, $z_t = \alpha_t z + \sigma_t \epsilon$, $t \in [0, 1]$."""

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """The share of data at time t (any shape)."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """The share of noise at time t (any shape)."""

    @abstractmethod
    def inverse(self, logsnr: Tensor | float) -> Tensor:
        """The time at which the log signal-to-noise ratio has this value (the nearest one where it never has)."""

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Both shares, (alpha_t, sigma_t)."""
        return self.alpha(t), self.sigma(t)

    def logsnr(self, t: Tensor | float) -> Tensor:
        r"""The log signal-to-noise ratio $\lambda_t = \log(\alpha_t^2 / \sigma_t^2)$, finite everywhere."""
        alpha, sigma = self(t)
        ratio = alpha.clamp_min(_TINY).log() - sigma.clamp_min(_TINY).log()
        return (2 * ratio).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT)

    def dalpha(self, t: Tensor | float) -> Tensor:
        """The time derivative of alpha."""
        return _derivative(self.alpha, t)

    def dsigma(self, t: Tensor | float) -> Tensor:
        """The time derivative of sigma."""
        return _derivative(self.sigma, t)

    def settings(self) -> dict[str, object]:
        """What `make_schedule(**settings)` needs to build it again; fit for JSON."""
        name = next(name for name, kind in SCHEDULES.items() if kind is type(self))
        return {"name": name, **asdict(self)}  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(frozen=True)
class Flow(Schedule):
    r"""The straight path $\alpha = 1 - t$, $\sigma = t$ (flow matching, rectified flow).

    References:
        Lipman et al., Flow Matching for Generative Modeling, https://arxiv.org/abs/2210.02747 (eq. 20).
    """

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return time(t)

    def inverse(self, logsnr: Tensor | float) -> Tensor:
        return torch.sigmoid(-_double(logsnr) / 2)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""The quarter circle $\alpha = \cos(\pi t / 2)$, $\sigma = \sin(\pi t / 2)$.

    References:
        Nichol and Dhariwal, Improved DDPM, https://arxiv.org/abs/2102.09672 (eq. 17, without the offset).
    """

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(time(t) * (math.pi / 2))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sin(time(t) * (math.pi / 2))

    def inverse(self, logsnr: Tensor | float) -> Tensor:
        return torch.atan(torch.exp(-_double(logsnr) / 2)) * (2 / math.pi)


class VariancePreserving(Schedule):
    r"""Schedules with $\alpha^2 + \sigma^2 = 1$, given by the noise so far $b(t) = -\log \alpha_t^2 = \int \beta$."""

    @abstractmethod
    def spent(self, t: Tensor) -> Tensor:
        r"""The integral of beta up to t, $b(t) = -\log \alpha_t^2$."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-self.spent(time(t)) / 2)

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.spent(time(t))))


@dataclass(frozen=True)
class Linear(VariancePreserving):
    r"""The variance-preserving process of DDPM's linear betas in closed form: $\beta(t)$ rises from min to max.

    Args:
        beta_min: Rate at t = 0.
        beta_max: Rate at t = 1.

    References:
        Song et al., Score-Based Generative Modeling through SDEs, https://arxiv.org/abs/2011.13456 (eq. 33).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def spent(self, t: Tensor) -> Tensor:
        return t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2

    def inverse(self, logsnr: Tensor | float) -> Tensor:
        b = torch.nn.functional.softplus(-_double(logsnr))
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return time(2 * b / (self.beta_min + root))


@dataclass(frozen=True)
class Table(VariancePreserving):
    r"""A discrete list of betas: $\bar\alpha_k = \prod_{i \le k} (1 - \beta_i)$ at time t = (k + 1) / K, data at t = 0.

    Between two entries the rate is constant, so that the path is defined and invertible everywhere.

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
    def _spent(self) -> Tensor:
        rates = -torch.log1p(-torch.tensor(self.betas, dtype=torch.float64))
        return torch.cat([rates.new_zeros(1), rates.cumsum(0)])  # (K + 1,)

    def spent(self, t: Tensor) -> Tensor:
        k = t * len(self.betas)
        lower = k.long().clamp_max(len(self.betas) - 1)
        return torch.lerp(self._spent[lower], self._spent[lower + 1], k - lower)

    def inverse(self, logsnr: Tensor | float) -> Tensor:
        b = torch.nn.functional.softplus(-_double(logsnr)).clamp_max(self._spent[-1])
        upper = torch.searchsorted(self._spent, b).clamp(1, len(self.betas))
        below, above = self._spent[upper - 1], self._spent[upper]
        return (upper - 1 + (b - below) / (above - below)) / len(self.betas)


@dataclass(frozen=True)
class EDM(Schedule):
    r"""The variance-exploding path $\alpha = 1$, $\sigma$ from sigma_min to sigma_max with $\sigma^{1/\rho}$ even in t.

    An even grid in t is then the grid of the paper. (Latents have unit variance: `sigma_data` is 1.)

    Args:
        sigma_min: Noise at t = 0, small enough to be none.
        sigma_max: Noise at t = 1.
        rho: How strongly steps crowd towards the data.

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
        https://arxiv.org/abs/2206.00364 (eq. 5).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        low, high = self._ends
        return (low + time(t) * (high - low)) ** self.rho

    def inverse(self, logsnr: Tensor | float) -> Tensor:
        low, high = self._ends
        return time((torch.exp(-_double(logsnr) / (2 * self.rho)) - low) / (high - low))


@dataclass(frozen=True)
class Walk(Schedule):
    r"""The random walk $z_k = z_{k-1} + \sqrt{\tau} w_k$ of `steps` steps: $\alpha = 1$, $\sigma^2 = t \cdot T \tau$.

    The mean stays, the variance grows by tau a step. Step k is time k / steps.

    Args:
        steps: Their number T.
        tau: Variance a step adds.
    """

    steps: int = 1000
    tau: float = 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(time(t) * (self.steps * self.tau))

    def inverse(self, logsnr: Tensor | float) -> Tensor:
        return time(torch.exp(-_double(logsnr)) / (self.steps * self.tau))

    def forward(self, z: Tensor, w: Tensor) -> Tensor:
        r"""One step towards noise, $z_{k+1} = z_k + \sqrt{\tau} w$."""
        return z + math.sqrt(self.tau) * w

    def reverse(self, z: Tensor, score: Tensor, w: Tensor | None = None) -> Tensor:
        r"""One step towards the data, $z_k = z_{k+1} + \tau \nabla \log p(z_{k+1}) + \sqrt{\tau} w$.

        Without w the deterministic one, with half the score. Without the score (zero) it is only another step of the
        walk: subtracting fresh noise adds variance as surely as adding it does.
        """
        if w is None:
            return z + self.tau / 2 * score
        return z + self.tau * score + math.sqrt(self.tau) * w


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "flow": Flow,
    "cosine": Cosine,
    "linear": Linear,
    "table": Table,
    "edm": EDM,
    "ve": EDM,
    "walk": Walk,
}


def make_schedule(name: str, **settings: object) -> Schedule:
    """The schedule of that name in `SCHEDULES`, with settings of its constructor.

    Raises:
        UserError: The name or a setting is unknown; the nearest one is suggested.
    """
    return build(SCHEDULES, "schedule", name, settings)
