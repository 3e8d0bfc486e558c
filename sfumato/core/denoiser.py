r"""The denoiser: whatever the network predicts, only $\hat z = E[z | z_t]$ leaves this module.

A `Prediction` answers what the network sees, what $\hat z$ is given its output F, and what the loss is:
$\hat z = c_{skip} z_t + c_{out} F$. With latents of unit variance, the preconditioning of EDM equals the prediction `v`
up to the sign of F.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.core.categorical import cross_entropy, expectation, log_probabilities
from sfumato.core.schedule import NoiseLevel, Schedule, Segments, append_dims_as
from sfumato.registry import choose
from sfumato.types import CategoricalLayout, Cond

ALPHA_MIN = 1e-3  # smallest alpha that the prediction eps divides by


class Preconditioning(NamedTuple):
    """A prediction's coefficients: z_hat = c_skip z_t + c_out F, and F's target is target_z z + target_eps eps."""

    c_skip: Tensor
    c_out: Tensor
    target_z: Tensor
    target_eps: Tensor


def _z(alpha: Tensor, sigma: Tensor) -> Preconditioning:
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return Preconditioning(zero, one, one, zero)


def _eps(alpha: Tensor, sigma: Tensor) -> Preconditioning:
    alpha = alpha.clamp_min(ALPHA_MIN)
    return Preconditioning(1 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha))


def _v(alpha: Tensor, sigma: Tensor) -> Preconditioning:
    r = torch.hypot(alpha, sigma)
    return Preconditioning(alpha / r**2, -sigma / r, -sigma / r, alpha / r)


def _flow(alpha: Tensor, sigma: Tensor) -> Preconditioning:
    one = torch.ones_like(alpha)
    return Preconditioning(1 / (alpha + sigma), -sigma / (alpha + sigma), -one, one)


PREDICTIONS: dict[str, Callable[[Tensor, Tensor], Preconditioning]] = {"z": _z, "eps": _eps, "v": _v, "flow": _flow}


class Prediction(ABC):
    """What the network's output F means. Levels have the leading axes of z, or are scalars."""

    @abstractmethod
    def network_input(self, z_t: Tensor, level: NoiseLevel) -> Tensor:
        """The network's input (B, ...) from noisy latents z_t (B, ...)."""

    @abstractmethod
    def expectation(self, f: Tensor, z_t: Tensor, level: NoiseLevel) -> Tensor:
        r"""$\hat z = E[z | z_t]$ (B, ...) from the network's output F (B, ...) for z_t."""

    @abstractmethod
    def loss(
        self, f: Tensor, z: Tensor, eps: Tensor, z_t: Tensor, level: NoiseLevel, weight: Tensor | float = 1.0
    ) -> Tensor:
        r"""The loss of every element (B, ...), $w \, (\hat z - z)^2$ where z is continuous.

        Args:
            f: The network's output F (B, ...).
            z: Clean latents (B, ...).
            eps: Their noise (B, ...).
            z_t: alpha_t z + sigma_t eps.
            level: The noise level.
            weight: w, in the shape of the level.
        """


@dataclass(frozen=True)
class ContinuousPrediction(Prediction):
    r"""F predicts a combination of z and eps.

    The network sees $c_{in} z_t$ of unit variance, $c_{in} = 1 / \sqrt{\alpha^2 + \sigma^2}$.

    Args:
        name: `z`, `eps`, `v` or `flow` (eps - z).

    Raises:
        UserError: The name is unknown.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (eq. 7); Salimans and Ho, https://arxiv.org/abs/2202.00512.
    """

    name: str

    def __post_init__(self) -> None:
        choose(PREDICTIONS, "prediction", self.name)

    def preconditioning(self, level: NoiseLevel) -> Preconditioning:
        """The coefficients at a level, float64 in its shape."""
        return PREDICTIONS[self.name](level.alpha, level.sigma)

    def network_input(self, z_t: Tensor, level: NoiseLevel) -> Tensor:
        return append_dims_as(1 / torch.hypot(level.alpha, level.sigma), z_t) * z_t

    def expectation(self, f: Tensor, z_t: Tensor, level: NoiseLevel) -> Tensor:
        c = self.preconditioning(level)
        return append_dims_as(c.c_skip, z_t) * z_t + append_dims_as(c.c_out, z_t) * f

    def loss(
        self, f: Tensor, z: Tensor, eps: Tensor, z_t: Tensor, level: NoiseLevel, weight: Tensor | float = 1.0
    ) -> Tensor:
        c = self.preconditioning(level)  # c_out F + ... is z_hat, so the errors differ by c_out: no division by it
        target = append_dims_as(c.target_z, z) * z + append_dims_as(c.target_eps, z) * eps
        return append_dims_as(weight * c.c_out**2, z) * (f - target) ** 2


@dataclass(frozen=True)
class CategoricalPrediction(Prediction):
    """Latents (B, D) that end in categories: there F adjusts log probabilities (see `categorical`).

    The network sees each category's own posterior mean, which is as informative as z_t. Its loss is twice the
    cross-entropy, times w c_out^2, so that all errors are -2 log P.

    Args:
        continuous: The prediction of the other positions.
        layout: The positions of the categories.
    """

    continuous: ContinuousPrediction
    layout: CategoricalLayout

    def _join(self, continuous: Tensor, categorical: Tensor) -> Tensor:
        return torch.cat([continuous[:, : self.layout.start], categorical], 1)

    def network_input(self, z_t: Tensor, level: NoiseLevel) -> Tensor:
        log_p = log_probabilities(self.layout, torch.zeros_like(z_t), z_t, level)
        return self._join(self.continuous.network_input(z_t, level), expectation(self.layout, log_p))

    def expectation(self, f: Tensor, z_t: Tensor, level: NoiseLevel) -> Tensor:
        log_p = log_probabilities(self.layout, f, z_t, level)
        return self._join(self.continuous.expectation(f, z_t, level), expectation(self.layout, log_p))

    def loss(
        self, f: Tensor, z: Tensor, eps: Tensor, z_t: Tensor, level: NoiseLevel, weight: Tensor | float = 1.0
    ) -> Tensor:
        scale = append_dims_as(2 * weight * self.continuous.preconditioning(level).c_out ** 2, z)
        entropy = cross_entropy(self.layout, log_probabilities(self.layout, f, z_t, level), z)
        return self._join(self.continuous.loss(f, z, eps, z_t, level, weight), scale * entropy)


def make_prediction(name: str, layout: CategoricalLayout | None = None) -> Prediction:
    """The prediction by its name in `PREDICTIONS`, with categories if a latent has any.

    Raises:
        UserError: The name is unknown.
    """
    continuous = ContinuousPrediction(name)
    return continuous if layout is None else CategoricalPrediction(continuous, layout)


# largest |clock|, at |log(sigma / alpha)| = 7: training hardly samples beyond it, but samplers start there
CLOCK_LIMIT = 1.75

Denoise = Callable[[Tensor, NoiseLevel], Tensor]  # (z_t, level) -> z_hat, with condition and guidance bound

_NO_CONDITION = Cond()  # built once, because torch.compile cannot build it


def clock(level: NoiseLevel) -> Tensor:
    r"""The network's time input $c_{noise} = \log(\sigma / \alpha) / 4$, in the shape of the level."""
    return (-level.logsnr / 8).clamp(-CLOCK_LIMIT, CLOCK_LIMIT)


class Denoiser(nn.Module):
    r"""$\hat z = E[z | z_t]$ from a network, a schedule and what the network predicts.

    Args:
        net: `net(z_in, clocks, cond, mask) -> F` with F in the shape of z_in (B, \*latent_shape); clocks (B, K), or
            (B, N, K) for a time per position.
        schedule: The noise schedule.
        prediction: What F predicts, or its name: `z`, `eps`, `v` or `flow` (eps - z).
        segments: Positions of each segment that has a time of its own; empty for one time.

    Raises:
        UserError: Unknown prediction.
    """

    def __init__(
        self, net: nn.Module, schedule: Schedule, prediction: str | Prediction = "flow", segments: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.prediction = ContinuousPrediction(prediction) if isinstance(prediction, str) else prediction
        self.segments = Segments(tuple(segments))

    def network_output(
        self, z_t: Tensor, level: NoiseLevel, cond: Cond | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The network's raw output F (B, ...), in the dtype of z_t."""
        return self._network_output(z_t, level, (level,), cond, mask)

    def _network_output(
        self, z_t: Tensor, level: NoiseLevel, times: Sequence[NoiseLevel], cond: Cond | None, mask: Tensor | None
    ) -> Tensor:
        """F, with a clock for each of the times. The only place that casts to the network's dtype.

        Under autocast the weights, and so the input, are float32, and the network's layers cast.
        """
        weight = next(self.net.parameters(), z_t)
        z_in = self.prediction.network_input(z_t, level).to(weight.dtype)
        leading = z_t.shape[: max(1, level.t.ndim)]
        # float32 even for a bf16 network: its Fourier features need the precision
        clocks = torch.stack([clock(time).expand(leading) for time in times], -1).to(z_t)  # (B, K) or (B, N, K)
        return self.net(z_in, clocks, cond or _NO_CONDITION, mask).to(z_t.dtype)

    def forward(self, z_t: Tensor, level: NoiseLevel, cond: Cond | None = None, mask: Tensor | None = None) -> Tensor:
        """The expected data $E[z | z_t]$.

        Args:
            z_t: Noisy latents (B, ...), float32.
            level: Their noise level: a scalar, (B,), or (B, N) for one per position of tokens.
            cond: The condition.
            mask: (B, N), true where an item has a token.

        Returns:
            z_hat (B, ...), float32.
        """
        return self.prediction.expectation(self.network_output(z_t, level, cond, mask), z_t, level)

    def bind(self, cond: Cond | None, mask: Tensor | None = None) -> "BoundDenoiser":
        """The denoiser of a batch with this condition and mask."""
        return BoundDenoiser(self, cond, mask)


class TrajectoryDenoiser(Denoiser):
    """A denoiser whose network has a second clock, the time s where a step ends (see `consistency`).

    With s = 0 it returns the end of the probability flow through z_t, with s = t the posterior mean.
    """

    def network_output(
        self,
        z_t: Tensor,
        level: NoiseLevel,
        cond: Cond | None = None,
        mask: Tensor | None = None,
        end: NoiseLevel | None = None,
    ) -> Tensor:
        """The network's raw output F for a step that ends at the level `end`; by default at that of z_t."""
        return self._network_output(z_t, level, (level, end or level), cond, mask)

    def forward(
        self,
        z_t: Tensor,
        level: NoiseLevel,
        cond: Cond | None = None,
        mask: Tensor | None = None,
        end: NoiseLevel | None = None,
    ) -> Tensor:
        """z_hat (B, ...) for a step that ends at the level `end` (see `Denoiser.forward`)."""
        return self.prediction.expectation(self.network_output(z_t, level, cond, mask, end), z_t, level)


@dataclass(frozen=True)
class BoundDenoiser:
    """A denoiser of a batch, with its condition and mask bound: (z_t, level) -> z_hat.

    Args:
        denoiser: The denoiser.
        cond: The condition; None for none.
        mask: (B, N), true where an item has a token; None if nothing is padded.
    """

    denoiser: Denoiser
    cond: Cond | None = None
    mask: Tensor | None = None

    def __call__(self, z_t: Tensor, level: NoiseLevel) -> Tensor:
        return self.denoiser(z_t, level, self.cond, self.mask)

    def network_output(self, z_t: Tensor, level: NoiseLevel) -> Tensor:
        """The network's raw output F (B, ...)."""
        return self.denoiser.network_output(z_t, level, self.cond, self.mask)
