r"""Samplers: one loop over a time grid; a sampler is a rule for one step, with its memory handed in and out.

A denoiser gives $\hat z$, and with it $\hat\epsilon = (z_t - \alpha_t \hat z) / \sigma_t$. Along the probability flow
$dz = \hat z \, d\alpha + \hat\epsilon \, d\sigma$. The rules are written with the increments of (alpha, sigma)
themselves, so none depends on how fast a schedule runs through them. The step that ends at t = 0 returns $\hat z$.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..choice import choose
from ..errors import UserError
from .denoiser import aligned, trail
from .schedule import Schedule, time

Denoise = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]
OnStep = Callable[[int, Tensor, Tensor, Tensor], None]

_TINY = 1e-20


class Knot(NamedTuple):
    """The path at one time, float64 in the shape of t: alpha, sigma (both kept above zero), log(alpha / sigma)."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor


class Past(NamedTuple):
    """A multistep rule's memory: where the last step started, and what the denoiser said there and one step earlier."""

    knot: Knot
    z: Tensor
    z_hat: Tensor
    before: tuple[Tensor, Tensor] | None  # (lam, z_hat)


State = Past | None
Stepped = tuple[Tensor, State, Tensor]
Ask = Callable[[Tensor, Knot], Tensor]
Move = Callable[[Tensor, Tensor, Knot, Knot, Draw | None], Tensor]


class Step(Protocol):
    """One step of a sampler from time t to time s < t.

    Args:
        denoise: (z, t) -> z_hat, with conditions and guidance bound; t has the leading axes of z.
        schedule: The path.
        z: State (B, ...) at time t, float32.
        t: Now: a scalar, (B,), or any shape that broadcasts with the leading axes of z.
        s: Next, in the same shape.
        noise: Draws standard normal noise in the shape of z; only stochastic rules call it.
        state: What the last step handed on; None at first.

    Returns:
        z at time s, the state to hand on, and z_hat at time t.
    """

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped: ...


def _knot(schedule: Schedule, t: Tensor) -> Knot:
    alpha, sigma = (x.clamp_min(_TINY) for x in schedule(t))
    return Knot(t, alpha, sigma, alpha.log() - sigma.log())


def _by(c: Tensor, z: Tensor) -> Tensor:
    """A coefficient ready to multiply z; a scalar already is (it does not promote z, on whatever device)."""
    return c if c.ndim == 0 else trail(c, z)


def _transport(z: Tensor, z_hat: Tensor, now: Knot, then: Knot, noise: Draw | None = None) -> Tensor:
    r"""$z_s = (\sigma_s / \sigma_t) z_t + (\alpha_s - \alpha_t \sigma_s / \sigma_t) \hat z$: no new noise."""
    ratio = then.sigma / now.sigma
    return _by(ratio, z) * z + _by(then.alpha - ratio * now.alpha, z) * z_hat


def _renoise(z: Tensor, z_hat: Tensor, now: Knot, then: Knot, noise: Draw | None) -> Tensor:
    r"""A draw from $q(z_s | z_t, \hat z)$; with $e^{-h} = (\sigma_s / \alpha_s) (\alpha_t / \sigma_t)$ that is.

    $z_s = (\sigma_s / \sigma_t) e^{-h} z_t + \alpha_s (1 - e^{-2h}) \hat z + \sigma_s \sqrt{1 - e^{-2h}} w$.
    """
    if noise is None:
        raise ValueError("a stochastic sampler (ddpm, sde) needs `noise`")
    ratio = then.sigma / now.sigma
    shrink = ratio * now.alpha / then.alpha
    fresh = 1 - shrink**2
    mean = _by(ratio * shrink, z) * z + _by(then.alpha * fresh, z) * z_hat
    return mean + _by(then.sigma * fresh.sqrt(), z) * noise().to(z)


class Rule(ABC):
    """A `Step` that ends well: what arrives at s = 0 is z_hat (and what already was at t = 0 stays)."""

    calls = 1  # of the denoiser a step; the last one, to s = 0, always takes one

    @property
    def stochastic(self) -> bool:
        """Whether steps draw new noise: where one arrives is then not said by where it began."""
        return False

    @abstractmethod
    def advance(self, ask: Ask, z: Tensor, now: Knot, then: Knot, noise: Draw | None, state: State) -> Stepped:
        """The step itself, where s > 0."""

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped:
        def ask(z: Tensor, knot: Knot) -> Tensor:
            return denoise(z, knot.t.expand(z.shape[: max(1, t.ndim)]))

        now, then, arrives, clean = _knot(schedule, t), _knot(schedule, s), s <= 0, t <= 0
        if arrives.all() and not clean.any():
            z_hat = ask(z, now)
            return z_hat, None, z_hat
        z_s, state, z_hat = self.advance(ask, z, now, then, noise, state)
        if arrives.any():
            z_s = torch.where(aligned(arrives, z), torch.where(aligned(clean, z), z, z_hat), z_s)
        return z_s, state, z_hat


@dataclass(frozen=True)
class Heun(Rule):
    r"""Two calls a step, second order: the trapezium of $\hat z$ and $\hat\epsilon$ at both ends.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (algorithm 1, without churn).
    """

    calls = 2

    def advance(self, ask: Ask, z: Tensor, now: Knot, then: Knot, noise: Draw | None, state: State) -> Stepped:
        z_hat = ask(z, now)
        z_s = _transport(z, z_hat, now, then)
        z_hat_s = ask(z_s, then)
        eps = _by(1 / now.sigma, z) * z - _by(now.alpha / now.sigma, z) * z_hat
        eps_s = _by(1 / then.sigma, z) * z_s - _by(then.alpha / then.sigma, z) * z_hat_s
        dalpha, dsigma = _by((then.alpha - now.alpha) / 2, z), _by((then.sigma - now.sigma) / 2, z)
        return z + dalpha * (z_hat + z_hat_s) + dsigma * (eps + eps_s), None, z_hat


@dataclass(frozen=True)
class Multistep(Rule):
    """One call a step; z_hat is held (order 1) or continued on the line through the last two (order 2).

    Args:
        move: How z gets from t to s given z_hat: `_transport` (no noise) or `_renoise`.
        order: 1 or 2.
        correct: Whether each call first does the step before again, now that z_hat at its end is known.
    """

    move: Move
    order: int = 1
    correct: bool = False

    @property
    def stochastic(self) -> bool:
        return self.move is _renoise

    def advance(self, ask: Ask, z: Tensor, now: Knot, then: Knot, noise: Draw | None, state: State) -> Stepped:
        z_hat = middle = ask(z, now)
        if self.order == 1:
            return self.move(z, z_hat, now, then, noise), None, z_hat
        if state is not None:
            ahead = (then.lam - now.lam) / (2 * (now.lam - state.knot.lam))
            middle = z_hat + _by(ahead, z) * (z_hat - state.z_hat)
            z = _corrected(state, now, z_hat) if self.correct else z
        before = None if state is None else (state.knot.lam, state.z_hat)
        return self.move(z, middle, now, then, noise), Past(now, z, z_hat, before), z_hat


@dataclass(frozen=True)
class Adams(Rule):
    r"""One call a step, second order: $\hat z$ is a line in $\phi = atan(\sigma / \alpha)$, and all else is exact.

    With slope $m$ from t to s: $z_s = (\sigma_s / \sigma_t) z_t + (\alpha_s - \alpha_t \sigma_s / \sigma_t) \hat z_t
    + m \sigma_s \int_t^s (\phi - \phi_t) d(\alpha / \sigma)$, and with $\alpha / \sigma = \cot \phi$ the integral is
    $(\phi_s - \phi_t) \cot \phi_s - \ln(\sin \phi_s / \sin \phi_t)$. Each call gives the slope over the step before,
    which is done again with it (Moulton), and carries it on over the next one (Bashforth). Unlike the logarithm of the
    signal-to-noise ratio the angle is finite at both ends, so pure noise is a time like any other.

    References:
        Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I (section III.1, PEC).
    """

    def advance(self, ask: Ask, z: Tensor, now: Knot, then: Knot, noise: Draw | None, state: State) -> Stepped:
        z_hat = ask(z, now)
        if state is None:
            return _transport(z, z_hat, now, then), Past(now, z, z_hat, None), z_hat
        slope = _by(1 / (_angle(now) - _angle(state.knot)), z) * (z_hat - state.z_hat)
        z = _along(state.z, state.z_hat, slope, state.knot, now)
        return _along(z, z_hat, slope, now, then), Past(now, z, z_hat, None), z_hat


def _angle(knot: Knot) -> Tensor:
    return torch.atan2(knot.sigma, knot.alpha)


def _along(z: Tensor, z_hat: Tensor, slope: Tensor, now: Knot, then: Knot) -> Tensor:
    """From t to s with z_hat going up by `slope` for each radian."""
    turn = _angle(then) - _angle(now)
    growth = (_angle(then).sin() / _angle(now).sin()).log()
    return _transport(z, z_hat, now, then) + _by(turn * then.alpha - growth * then.sigma, z) * slope


def _corrected(past: Past, now: Knot, z_hat: Tensor) -> Tensor:
    """The last step again (UniC), now that z_hat at its end is known."""
    if past.before is None:
        return _transport(past.z, torch.lerp(past.z_hat, z_hat, 0.5), past.knot, now)
    lam, earlier = past.before
    h = now.lam - past.knot.lam
    r = (lam - past.knot.lam) / h
    phi_1 = torch.expm1(-h)
    b_1 = (phi_1 / -h - 1) / phi_1
    b_2 = 2 * ((phi_1 / -h - 1) / -h - 0.5) / phi_1
    back = (b_1 - b_2) / (1 - r)
    slope = _by(back / r, z_hat) * (earlier - past.z_hat) + _by(b_1 - back, z_hat) * (z_hat - past.z_hat)
    return _transport(past.z, past.z_hat + slope, past.knot, now)


# ddim: Song et al. 2020, https://arxiv.org/abs/2010.02502 (eq. 12, eta = 0). It *is* Euler's rule along the path,
#   z + z_hat dalpha + eps_hat dsigma: on `flow` the Euler step of flow matching, on `edm` that of Karras et al.
# ddpm: Ho et al. 2020, https://arxiv.org/abs/2006.11239 (eq. 6 and 7).
# dpmpp_2m, sde: Lu et al. 2022, DPM-Solver++ and SDE-DPM-Solver++ (2M), https://arxiv.org/abs/2211.01095.
# abm2: see `Adams`.
# unipc: Zhao et al. 2023, https://arxiv.org/abs/2302.04867 (UniPC-2, B(h) = e^h - 1; its predictor is dpmpp_2m).
SAMPLERS: dict[str, Rule] = {
    "ddpm": Multistep(_renoise),
    "ddim": Multistep(_transport),
    "euler": Multistep(_transport),
    "heun": Heun(),
    "dpmpp_2m": Multistep(_transport, order=2),
    "unipc": Multistep(_transport, order=2, correct=True),
    "abm2": Adams(),
    "sde": Multistep(_renoise, order=2),
}


def sample(
    denoise: Denoise,
    schedule: Schedule,
    z: Tensor,
    grid: Tensor,
    sampler: str | Step = "heun",
    noise: Draw | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow a time grid from noise to data. Call it under `torch.no_grad()` unless gradients are wanted.

    Args:
        denoise: (z, t) -> z_hat, with conditions and guidance bound; t is (B,), or as wide as the grid says.
        schedule: The path.
        z: Where to start (B, ...), at time grid[0].
        grid: Times (steps + 1,), falling; or (steps + 1, ...) with axes that broadcast with the leading ones of z,
            for a time per item, token or segment.
        sampler: A name of `SAMPLERS`, or a rule.
        noise: Draws noise in the shape of z, for the stochastic rules.
        on_step: Called as on_step(i, t, z, z_hat) after each step, with z at the step's end.

    Returns:
        z (B, ...) at time grid[-1], float32 (or float64, if z came so); where that is 0, the last z_hat.

    Raises:
        UserError: Unknown sampler.
    """
    step = choose(SAMPLERS, "sampler", sampler) if isinstance(sampler, str) else sampler
    z, state = z.to(torch.promote_types(z.dtype, torch.float32)), None
    for i, (t, s) in enumerate(pairwise(time(grid))):
        z, state, z_hat = step(denoise, schedule, z, t, s, noise, state)
        if on_step is not None:
            on_step(i, t, z, z_hat)
    return z


def denoiser_calls(sampler: str, steps: int) -> int:
    """How often a sampler calls the denoiser on its way to t = 0."""
    return choose(SAMPLERS, "sampler", sampler).calls * (steps - 1) + 1


def prior(schedule: Schedule, noise: Draw, t: float = 1.0) -> Tensor:
    """Where sampling starts: noise with the variance alpha^2 + sigma^2 that unit-variance latents have at time t."""
    alpha, sigma = schedule(t)
    return float(torch.hypot(alpha, sigma)) * noise()


def _karras(low: Tensor, high: Tensor, u: Tensor, rho: float = 7.0) -> Tensor:
    first, last = torch.exp(-low / (2 * rho)), torch.exp(-high / (2 * rho))  # (sigma / alpha)^(1 / rho)
    return -2 * rho * torch.lerp(first, last, u).log()


def _ends(u: Tensor) -> Tensor:
    return (u + torch.sin(u * (math.pi / 2)) ** 2) / 2


def _early(u: Tensor) -> Tensor:
    return 1 - (1 - u).sqrt()


def _late(u: Tensor) -> Tensor:
    return 1 - (1 - u) ** 1.5


IN_TIME: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "ends": _ends,
    "early": _early,
    "late": _late,
}
SPACINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"logsnr": torch.lerp, "karras": _karras}
GRIDS = (*IN_TIME, *SPACINGS)


def time_grid(schedule: Schedule, steps: int, kind: str = "uniform", t_max: float = 1.0, t_min: float = 0.0) -> Tensor:
    """Falling times from t_max to t_min, (steps + 1,), float64.

    Args:
        schedule: The path the times are for.
        steps: Number of steps, at least 1.
        kind: `uniform` in t, `ends` (finer towards both ends: the mean of an even grid and a cosine one), `early` and
            `late` (for jumps: finer towards the noise, t^2 even, or the data, t^(2/3) even), `logsnr` (even in the log
            signal-to-noise ratio) or `karras` (even in (sigma / alpha)^(1/7)). The last two span sigma / alpha in
            [0.002, 80] and add t_max and t_min as they are.
        t_max: First time.
        t_min: Last time.

    Raises:
        UserError: Unknown kind, or no steps.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if kind in IN_TIME:
        u = IN_TIME[kind](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        return torch.lerp(u.new_tensor(t_max), u.new_tensor(t_min), u)
    spacing = SPACINGS[choose({name: name for name in GRIDS}, "time grid", kind)]
    low, high = schedule.logsnr(torch.tensor([t_max, t_min])).clamp(-2 * math.log(80.0), -2 * math.log(0.002))
    inner = steps if schedule.inverse(high) > t_min + 1e-9 else steps + 1  # t_min beyond the span is a step of its own
    u = torch.linspace(0, 1, inner, dtype=torch.float64)
    grid = torch.cat([schedule.inverse(spacing(low, high, u)), u.new_full((steps + 1 - inner,), t_min)])
    grid[0], grid[-1] = t_max, t_min
    return grid
