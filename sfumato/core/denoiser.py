r"""The denoiser: whatever the network predicts, only $\hat z = E[z | z_t]$ leaves this module.

$\hat z = c_{skip} z_t + c_{out} F(c_{in} z_t, c_{noise})$. With latents of unit variance, the preconditioning of EDM
equals the prediction `v` up to the sign of F.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.core.categorical import expectation, log_probabilities
from sfumato.core.schedule import Schedule
from sfumato.registry import choose
from sfumato.types import CategoricalLayout, Cond

# largest |clock|, at |log(sigma / alpha)| = 7: training hardly samples beyond it, but samplers start there
CLOCK_LIMIT = 1.75
ALPHA_MIN = 1e-3  # smallest alpha that the prediction eps divides by

_NO_CONDITION = Cond()  # built once, because torch.compile cannot build it


class GuideTerm(NamedTuple):
    """The guide of autoguidance: a weaker network, its condition and the weight w in F_weak + w (F - F_weak).

    The outputs F are extrapolated, not z_hat, so that for categories the guided F still gives probabilities.

    References:
        Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, https://arxiv.org/abs/2406.02507.
    """

    net: nn.Module
    cond: Cond | None
    weight: float


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


def append_dims(value: Tensor, like: Tensor) -> Tensor:
    """Append axes of size 1 up to `like.ndim`, on its device: (B,) or (B, N) -> (B, 1, ...) or (B, N, 1, ...)."""
    return value.to(like.device).reshape(value.shape + (1,) * (like.ndim - value.ndim))


def append_dims_as(value: Tensor, like: Tensor) -> Tensor:
    """`append_dims` after a cast to the dtype of `like`."""
    return append_dims(value.to(like.dtype), like)


class Denoiser(nn.Module):
    r"""$\hat z = E[z | z_t]$ from a network, a schedule and the prediction that the network makes.

    Args:
        net: `net(z_in, clocks, cond, mask) -> F` with F in the shape of z_in (B, \*latent_shape).
        schedule: The noise schedule.
        predict: What F predicts: `z`, `eps`, `v` or `flow` (eps - z).
        clock: t -> the network's time input $c_{noise}$, in the shape of t; default $\log(\sigma / \alpha) / 4$.
        c_in: t -> the scale of the network's input; default $1 / \sqrt{\alpha^2 + \sigma^2}$.
        two_times: Whether the network takes a second clock for the time s where a step ends (see `consistency`).
        layout: Returns the positions that are categories, or None; there F adjusts log probabilities (see
            `categorical`).

    Raises:
        UserError: Unknown `predict`.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (eq. 7); Salimans and Ho, https://arxiv.org/abs/2202.00512.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        predict: str = "flow",
        clock: Callable[[Tensor], Tensor] | None = None,
        c_in: Callable[[Tensor], Tensor] | None = None,
        two_times: bool = False,
        layout: Callable[[], CategoricalLayout | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.predict = predict
        self.two_times = two_times
        self.preconditioning = choose(PREDICTIONS, "prediction", predict)
        self.clock = clock or self._clock
        self.c_in = c_in or self._c_in
        self.layout = layout

    def _clock(self, t: Tensor) -> Tensor:
        return (-self.schedule.logsnr(t) / 8).clamp(-CLOCK_LIMIT, CLOCK_LIMIT)

    def _c_in(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule(t)
        return 1 / torch.hypot(alpha, sigma)

    def coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at t (B,) or (B, N), float64 on the CPU, with axes of one up to `ndim`."""
        shape = t.shape + (1,) * (ndim - t.ndim)
        c = self.preconditioning(*self.schedule(t))
        return c.c_skip.reshape(shape), c.c_out.reshape(shape)

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The training target of F from z and eps (B, ...), without a division by c_out."""
        c = self.preconditioning(*self.schedule(t))
        return append_dims_as(c.target_z, z) * z + append_dims_as(c.target_eps, z) * eps

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t z + sigma_t eps, in the dtype of z."""
        alpha, sigma = self.schedule(t)
        return append_dims_as(alpha, z) * z + append_dims_as(sigma, z) * eps

    def network_output(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        mask: Tensor | None = None,
        s: Tensor | None = None,
        guide: GuideTerm | None = None,
    ) -> Tensor:
        """The network's raw output F (B, ...), in the dtype of z_t. The only place that casts to the network's dtype.

        Under autocast the weights, and so the input, are float32, and the network's layers cast.
        """
        weight = next(self.net.parameters(), z_t)
        z_in = self.network_input(z_t, t).to(weight.dtype)
        times = (t, t if s is None else s) if self.two_times else (t,)
        # float32 even for a bf16 network: its Fourier features need the precision
        clocks = torch.stack([self.clock(x) for x in times], -1).to(z_t)
        clocks = clocks if t.ndim == 1 else clocks.flatten(1, -2)  # (B, K) or (B, N, K)
        f = self.net(z_in, clocks, cond or _NO_CONDITION, mask).to(z_t.dtype)
        if guide is None:
            return f
        return torch.lerp(guide.net(z_in, clocks, guide.cond or _NO_CONDITION, mask).to(z_t.dtype), f, guide.weight)

    def network_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The network's input: c_in z_t; for categories each column's own posterior mean, which is as informative."""
        z_in, layout = append_dims_as(self.c_in(t), z_t) * z_t, self.layout()
        if layout is None:
            return z_in
        log_p = log_probabilities(layout, torch.zeros_like(z_t), z_t, *self.schedule(t))
        return torch.cat([z_in[:, : layout.start], expectation(layout, log_p)], 1)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        mask: Tensor | None = None,
        s: Tensor | None = None,
        guide: GuideTerm | None = None,
    ) -> Tensor:
        """The expected data $E[z | z_t]$.

        Args:
            z_t: Noisy latents (B, ...), float32.
            t: Times (B,), or (B, N) for one per leading position.
            cond: The condition.
            mask: (B, N), true where a padded item has data.
            s: Times where the step ends, in the shape of t, for a network with `two_times`: with s = 0 the result is
                the end of the probability flow.
            guide: The weaker network of autoguidance.

        Returns:
            z_hat (B, ...), float32.
        """
        c_skip, c_out = self.coefficients(t, z_t.ndim)
        f, layout = self.network_output(z_t, t, cond, mask, s, guide), self.layout()
        z_hat = c_skip.to(z_t) * z_t + c_out.to(z_t) * f
        if layout is None:
            return z_hat
        log_p = log_probabilities(layout, f, z_t, *self.schedule(t))
        return torch.cat([z_hat[:, : layout.start], expectation(layout, log_p)], 1)
