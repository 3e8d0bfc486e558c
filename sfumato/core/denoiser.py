r"""The denoiser: whatever the network predicts, only $\hat z = E[z | z_t]$ leaves this module.

$\hat z = c_{skip} z_t + c_{out} F(c_{in} z_t, c_{noise})$. With latents of unit variance, preconditioning in the way
of EDM is the row `v` up to the sign of F, and needs none of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..choice import choose
from ..types import Cond, Corners
from .corners import expected, log_chances
from .schedule import Schedule

CLOCK_LIMIT = 1.75  # log(sigma / alpha) within +-7: beyond it training sees next to nothing and a sampler starts there
ALPHA_MIN = 1e-3  # the row eps divides by alpha

_UNTOLD = Cond()  # made once: torch.compile cannot


class Weaker(NamedTuple):
    """A weaker network, what it is told, and the weight w of autoguidance: from F to F_weak + w (F - F_weak).

    The networks' outputs are what is extrapolated: where these are about chances, so are the guided ones.

    References:
        Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, https://arxiv.org/abs/2406.02507.
    """

    net: nn.Module
    cond: Cond | None
    weight: float


class Row(NamedTuple):
    """What F means: z_hat = c_skip z_t + c_out F, and the target of F is on_z z + on_eps eps."""

    c_skip: Tensor
    c_out: Tensor
    on_z: Tensor
    on_eps: Tensor


def _z(alpha: Tensor, sigma: Tensor) -> Row:
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return Row(zero, one, one, zero)


def _eps(alpha: Tensor, sigma: Tensor) -> Row:
    alpha = alpha.clamp_min(ALPHA_MIN)
    return Row(1 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha))


def _v(alpha: Tensor, sigma: Tensor) -> Row:
    r = torch.hypot(alpha, sigma)
    return Row(alpha / r**2, -sigma / r, -sigma / r, alpha / r)


def _flow(alpha: Tensor, sigma: Tensor) -> Row:
    one = torch.ones_like(alpha)
    return Row(1 / (alpha + sigma), -sigma / (alpha + sigma), -one, one)


PREDICT: dict[str, Callable[[Tensor, Tensor], Row]] = {"z": _z, "eps": _eps, "v": _v, "flow": _flow}


def aligned(value: Tensor, like: Tensor) -> Tensor:
    """A value per leading index on the device of `like`: (B,) or (B, N) -> (B, 1, ...) or (B, N, 1, ...)."""
    return value.to(like.device).reshape(value.shape + (1,) * (like.ndim - value.ndim))


def trail(value: Tensor, like: Tensor) -> Tensor:
    """The same, cast to multiply `like`."""
    return aligned(value.to(like.dtype), like)


class Denoiser(nn.Module):
    r"""$\hat z = E[z | z_t]$ from a network, a schedule and a meaning of the network's output.

    Args:
        net: `net(z_in, clocks, cond, mask) -> F` with F in the shape of z_in (B, \*latent_shape).
        schedule: The path z_t lies on.
        predict: What F means: `z`, `eps`, `v` or `flow` (eps - z).
        clock: t -> what the network is told of the time, in the shape of t; default $\log(\sigma / \alpha) / 4$.
        c_in: t -> the scale of the network's input; default $1 / \sqrt{\alpha^2 + \sigma^2}$.
        jumps: Whether the network has a second clock, which tells it where a step ends (see `consistency`).
        corners: What says which positions are categories, if any are: F is about their chances then, see `corners`.

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
        jumps: bool = False,
        corners: Callable[[], Corners | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.predict = predict
        self.jumps = jumps
        self.row = choose(PREDICT, "prediction", predict)
        self.clock = clock or self._clock
        self.c_in = c_in or self._c_in
        self.corners = corners

    def _clock(self, t: Tensor) -> Tensor:
        return (-self.schedule.logsnr(t) / 8).clamp(-CLOCK_LIMIT, CLOCK_LIMIT)

    def _c_in(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule(t)
        return 1 / torch.hypot(alpha, sigma)

    def coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at t (B,) or (B, N), float64 on the CPU, with axes of one up to `ndim`."""
        shape = t.shape + (1,) * (ndim - t.ndim)
        row = self.row(*self.schedule(t))
        return row.c_skip.reshape(shape), row.c_out.reshape(shape)

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What F should be, straight from z and eps (B, ...): never by a division by c_out."""
        row = self.row(*self.schedule(t))
        return trail(row.on_z, z) * z + trail(row.on_eps, z) * eps

    def noised(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t z + sigma_t eps, in the dtype of z."""
        alpha, sigma = self.schedule(t)
        return trail(alpha, z) * z + trail(sigma, z) * eps

    def output(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        mask: Tensor | None = None,
        s: Tensor | None = None,
        weaker: Weaker | None = None,
    ) -> Tensor:
        """The network's raw output F (B, ...), in float32. The one place where dtypes meet.

        Under autocast the weights, and so the input, are float32, and the network's own layers cast.
        """
        weight = next(self.net.parameters(), z_t)
        z_in = self._input(z_t, t).to(weight.dtype)
        times = (t, t if s is None else s) if self.jumps else (t,)
        # float32 even for a bf16 network: its features need the digits
        clocks = torch.stack([self.clock(x) for x in times], -1).to(z_t)
        clocks = clocks if t.ndim == 1 else clocks.flatten(1, -2)  # (B, K) or (B, N, K)
        f = self.net(z_in, clocks, cond or _UNTOLD, mask).to(z_t.dtype)
        if weaker is None:
            return f
        return torch.lerp(weaker.net(z_in, clocks, weaker.cond or _UNTOLD, mask).to(z_t.dtype), f, weaker.weight)

    def _input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees: z_t scaled; of categories what each column alone lets expect, which tells as much."""
        z_in, corners = trail(self.c_in(t), z_t) * z_t, self.corners()
        if corners is None:
            return z_in
        chances = log_chances(corners, torch.zeros_like(z_t), z_t, *self.schedule(t))
        return torch.cat([z_in[:, : corners.start], expected(corners, chances)], 1)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        mask: Tensor | None = None,
        s: Tensor | None = None,
        weaker: Weaker | None = None,
    ) -> Tensor:
        """The expected data $E[z | z_t]$.

        Args:
            z_t: Noisy latents (B, ...), float32.
            t: Times (B,), or (B, N) for one per leading position.
            cond: What the network is told.
            mask: (B, N), true where a padded item has data.
            s: Where the step ends, in the shape of t: at 0 z_hat is the end of the flow (a network with `jumps`).
            weaker: A network to move away from.

        Returns:
            z_hat (B, ...), float32.
        """
        c_skip, c_out = self.coefficients(t, z_t.ndim)
        f, corners = self.output(z_t, t, cond, mask, s, weaker), self.corners()
        z_hat = c_skip.to(z_t) * z_t + c_out.to(z_t) * f
        if corners is None:
            return z_hat
        chances = log_chances(corners, f, z_t, *self.schedule(t))
        return torch.cat([z_hat[:, : corners.start], expected(corners, chances)], 1)
