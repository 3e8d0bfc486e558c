r"""Samplers: one loop over a time grid; a sampler is a step rule with explicit state.

A denoiser gives $\hat z$, and with it $\hat\epsilon = (z_t - \alpha_t \hat z) / \sigma_t$. The probability flow is
$dz = \hat z \, d\alpha + \hat\epsilon \, d\sigma$. The rules use increments of alpha and sigma, not of t, so none
depends on how the schedule is parametrised in t. The step that ends at t = 0 returns $\hat z$.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.core.denoiser import append_dims, append_dims_as
from sfumato.core.schedule import Schedule, as_time
from sfumato.registry import choose

Denoise = Callable[[Tensor, Tensor], Tensor]
NoiseFn = Callable[[], Tensor]
StepCallback = Callable[[int, Tensor, Tensor, Tensor], None]

_LEVEL_FLOOR = 1e-20  # smallest alpha and sigma, so that quotients and logarithms stay finite


class NoiseLevel(NamedTuple):
    """The schedule at one time, float64 in the shape of t: alpha and sigma (both above zero), log(alpha / sigma)."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    half_logsnr: Tensor


class SolverState(NamedTuple):
    """The state of a multistep sampler: start of the last step, z_hat there, and z_hat one step earlier."""

    level: NoiseLevel
    z: Tensor
    z_hat: Tensor
    previous: tuple[Tensor, Tensor] | None  # (half_logsnr, z_hat)


State = SolverState | None
StepResult = tuple[Tensor, State, Tensor]
Evaluate = Callable[[Tensor, NoiseLevel], Tensor]
Transition = Callable[[Tensor, Tensor, NoiseLevel, NoiseLevel, NoiseFn | None], Tensor]


class Step(Protocol):
    """One step of a sampler from time t to time s < t.

    Args:
        denoise: (z, t) -> z_hat, with conditions and guidance bound; t has the leading axes of z.
        schedule: The noise schedule.
        z: Noisy latents (B, ...) at time t, float32.
        t: The current time: a scalar, (B,), or any shape that broadcasts with the leading axes of z.
        s: The next time, in the same shape.
        noise: Draws standard normal noise in the shape of z; only stochastic samplers call it.
        state: The state that the last step returned; None at first.

    Returns:
        z at time s, the new state, and z_hat at time t.
    """

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: NoiseFn | None, state: State
    ) -> StepResult: ...


def _level(schedule: Schedule, t: Tensor) -> NoiseLevel:
    alpha, sigma = (x.clamp_min(_LEVEL_FLOOR) for x in schedule(t))
    return NoiseLevel(t, alpha, sigma, alpha.log() - sigma.log())


def _coefficient(c: Tensor, z: Tensor) -> Tensor:
    """Broadcast a coefficient to z. A scalar stays as it is: it promotes neither dtype nor device of z."""
    return c if c.ndim == 0 else append_dims_as(c, z)


def _ddim_step(z: Tensor, z_hat: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None = None) -> Tensor:
    r"""Deterministic: $z_s = (\sigma_s / \sigma_t) z_t + (\alpha_s - \alpha_t \sigma_s / \sigma_t) \hat z$."""
    ratio = at_s.sigma / at_t.sigma
    return _coefficient(ratio, z) * z + _coefficient(at_s.alpha - ratio * at_t.alpha, z) * z_hat


def _ancestral_step(z: Tensor, z_hat: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None) -> Tensor:
    r"""Sample from the posterior $q(z_s | z_t, \hat z)$, with $e^{-h} = (\sigma_s / \alpha_s) (\alpha_t / \sigma_t)$.

    $z_s = (\sigma_s / \sigma_t) e^{-h} z_t + \alpha_s (1 - e^{-2h}) \hat z + \sigma_s \sqrt{1 - e^{-2h}} w$.
    """
    if noise is None:
        raise ValueError("a stochastic sampler (ddpm, sde) needs `noise`")
    ratio = at_s.sigma / at_t.sigma
    decay = ratio * at_t.alpha / at_s.alpha  # e^-h
    variance = 1 - decay**2
    mean = _coefficient(ratio * decay, z) * z + _coefficient(at_s.alpha * variance, z) * z_hat
    return mean + _coefficient(at_s.sigma * variance.sqrt(), z) * noise().to(z)


class Sampler(ABC):
    """A `Step` that handles the ends: at s = 0 it returns z_hat, and parts already at t = 0 stay unchanged."""

    evaluations = 1  # denoiser evaluations per step; the last step, to s = 0, always takes one

    @property
    def stochastic(self) -> bool:
        """Whether steps draw new noise, so that the start does not determine the result."""
        return False

    @abstractmethod
    def advance(
        self, evaluate: Evaluate, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        """The step for s > 0."""

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: NoiseFn | None, state: State
    ) -> StepResult:
        def evaluate(z: Tensor, level: NoiseLevel) -> Tensor:
            return denoise(z, level.t.expand(z.shape[: max(1, t.ndim)]))

        at_t, at_s, ends, clean = _level(schedule, t), _level(schedule, s), s <= 0, t <= 0
        if ends.all() and not clean.any():
            z_hat = evaluate(z, at_t)
            return z_hat, None, z_hat
        z_s, state, z_hat = self.advance(evaluate, z, at_t, at_s, noise, state)
        if ends.any():
            z_s = torch.where(append_dims(ends, z), torch.where(append_dims(clean, z), z, z_hat), z_s)
        return z_s, state, z_hat


@dataclass(frozen=True)
class Heun(Sampler):
    r"""Second order, two evaluations per step: the trapezoidal rule on $\hat z$ and $\hat\epsilon$.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (algorithm 1, without churn).
    """

    evaluations = 2

    def advance(
        self, evaluate: Evaluate, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_hat = evaluate(z, at_t)
        z_s = _ddim_step(z, z_hat, at_t, at_s)
        z_hat_s = evaluate(z_s, at_s)
        eps = _coefficient(1 / at_t.sigma, z) * z - _coefficient(at_t.alpha / at_t.sigma, z) * z_hat
        eps_s = _coefficient(1 / at_s.sigma, z) * z_s - _coefficient(at_s.alpha / at_s.sigma, z) * z_hat_s
        dalpha, dsigma = _coefficient((at_s.alpha - at_t.alpha) / 2, z), _coefficient((at_s.sigma - at_t.sigma) / 2, z)
        return z + dalpha * (z_hat + z_hat_s) + dsigma * (eps + eps_s), None, z_hat


@dataclass(frozen=True)
class Multistep(Sampler):
    """One evaluation per step; z_hat is constant (order 1) or extrapolated linearly from the last two (order 2).

    Args:
        transition: The step from t to s given z_hat: `_ddim_step` (deterministic) or `_ancestral_step`.
        order: 1 or 2.
        corrector: Whether each evaluation first repeats the previous step with z_hat at its end (UniC).
    """

    transition: Transition
    order: int = 1
    corrector: bool = False

    @property
    def stochastic(self) -> bool:
        return self.transition is _ancestral_step

    def advance(
        self, evaluate: Evaluate, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_hat = z_hat_mid = evaluate(z, at_t)
        if self.order == 1:
            return self.transition(z, z_hat, at_t, at_s, noise), None, z_hat
        if state is not None:
            half_step_ratio = (at_s.half_logsnr - at_t.half_logsnr) / (2 * (at_t.half_logsnr - state.level.half_logsnr))
            z_hat_mid = z_hat + _coefficient(half_step_ratio, z) * (z_hat - state.z_hat)
            z = _unic_step(state, at_t, z_hat) if self.corrector else z
        previous = None if state is None else (state.level.half_logsnr, state.z_hat)
        return self.transition(z, z_hat_mid, at_t, at_s, noise), SolverState(at_t, z, z_hat, previous), z_hat


@dataclass(frozen=True)
class Adams(Sampler):
    r"""Second order, one evaluation per step: $\hat z$ linear in $\phi = atan(\sigma / \alpha)$, integrated exactly.

    With slope $m$ from t to s: $z_s = (\sigma_s / \sigma_t) z_t + (\alpha_s - \alpha_t \sigma_s / \sigma_t) \hat z_t
    + m \sigma_s \int_t^s (\phi - \phi_t) d(\alpha / \sigma)$, and with $\alpha / \sigma = \cot \phi$ the integral is
    $(\phi_s - \phi_t) \cot \phi_s - \ln(\sin \phi_s / \sin \phi_t)$. Each evaluation gives the slope over the previous
    step, which is repeated with it (Moulton); the next step extrapolates it (Bashforth). Unlike the log-SNR, the angle
    is finite at both ends, so pure noise needs no special case.

    References:
        Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I (section III.1, PEC).
    """

    def advance(
        self, evaluate: Evaluate, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_hat = evaluate(z, at_t)
        if state is None:
            return _ddim_step(z, z_hat, at_t, at_s), SolverState(at_t, z, z_hat, None), z_hat
        slope = _coefficient(1 / (_angle(at_t) - _angle(state.level)), z) * (z_hat - state.z_hat)
        z = _adams_step(state.z, state.z_hat, slope, state.level, at_t)
        return _adams_step(z, z_hat, slope, at_t, at_s), SolverState(at_t, z, z_hat, None), z_hat


def _angle(level: NoiseLevel) -> Tensor:
    return torch.atan2(level.sigma, level.alpha)


def _adams_step(z: Tensor, z_hat: Tensor, slope: Tensor, at_t: NoiseLevel, at_s: NoiseLevel) -> Tensor:
    """From t to s, where z_hat changes by `slope` per radian."""
    dphi = _angle(at_s) - _angle(at_t)
    log_sine_ratio = (_angle(at_s).sin() / _angle(at_t).sin()).log()
    return _ddim_step(z, z_hat, at_t, at_s) + _coefficient(dphi * at_s.alpha - log_sine_ratio * at_s.sigma, z) * slope


def _unic_step(state: SolverState, at_t: NoiseLevel, z_hat: Tensor) -> Tensor:
    """The corrector UniC: repeat the last step with z_hat at its end."""
    if state.previous is None:
        return _ddim_step(state.z, torch.lerp(state.z_hat, z_hat, 0.5), state.level, at_t)
    lam, previous = state.previous
    h = at_t.half_logsnr - state.level.half_logsnr
    r = (lam - state.level.half_logsnr) / h
    phi_1 = torch.expm1(-h)
    b_1 = (phi_1 / -h - 1) / phi_1
    b_2 = 2 * ((phi_1 / -h - 1) / -h - 0.5) / phi_1
    rho = (b_1 - b_2) / (1 - r)  # weight of the previous difference, divided by r below
    correction = _coefficient(rho / r, z_hat) * (previous - state.z_hat) + _coefficient(b_1 - rho, z_hat) * (
        z_hat - state.z_hat
    )
    return _ddim_step(state.z, state.z_hat + correction, state.level, at_t)


# ddim: Song et al. 2020, https://arxiv.org/abs/2010.02502 (eq. 12, eta = 0). It equals the Euler step
#   z + z_hat dalpha + eps_hat dsigma: on `flow` that of flow matching, on `edm` that of Karras et al.
# ddpm: Ho et al. 2020, https://arxiv.org/abs/2006.11239 (eq. 6 and 7).
# dpmpp_2m, sde: Lu et al. 2022, DPM-Solver++ and SDE-DPM-Solver++ (2M), https://arxiv.org/abs/2211.01095.
# abm2: see `Adams`.
# unipc: Zhao et al. 2023, https://arxiv.org/abs/2302.04867 (UniPC-2, B(h) = e^h - 1; its predictor is dpmpp_2m).
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Multistep(_ancestral_step),
    "ddim": Multistep(_ddim_step),
    "euler": Multistep(_ddim_step),
    "heun": Heun(),
    "dpmpp_2m": Multistep(_ddim_step, order=2),
    "unipc": Multistep(_ddim_step, order=2, corrector=True),
    "abm2": Adams(),
    "sde": Multistep(_ancestral_step, order=2),
}


def sample(
    denoise: Denoise,
    schedule: Schedule,
    z: Tensor,
    grid: Tensor,
    sampler: str | Step = "heun",
    noise: NoiseFn | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Run a sampler along a time grid from noise to data. Call it under `torch.no_grad()` unless you need gradients.

    Args:
        denoise: (z, t) -> z_hat, with conditions and guidance bound; t is (B,), or has more leading axes of z if the
            grid does.
        schedule: The noise schedule.
        z: Initial noisy latents (B, ...), at time grid[0].
        grid: Decreasing times (steps + 1,); or (steps + 1, ...) with axes that broadcast with the leading ones of z,
            for a time per item, token or segment.
        sampler: A name in `SAMPLERS`, or a step rule.
        noise: Draws noise in the shape of z, for stochastic samplers.
        on_step: Called as on_step(i, t, z, z_hat) after each step, with z at the step's end.

    Returns:
        z (B, ...) at time grid[-1], float32 (float64 if z is); at time 0 it is the last z_hat.

    Raises:
        UserError: Unknown sampler.
    """
    step = choose(SAMPLERS, "sampler", sampler) if isinstance(sampler, str) else sampler
    z, state = z.to(torch.promote_types(z.dtype, torch.float32)), None
    for i, (t, s) in enumerate(pairwise(as_time(grid))):
        z, state, z_hat = step(denoise, schedule, z, t, s, noise, state)
        if on_step is not None:
            on_step(i, t, z, z_hat)
    return z


def denoiser_evaluations(sampler: str, steps: int) -> int:
    """Number of denoiser evaluations of a sampler on a grid that ends at t = 0."""
    return choose(SAMPLERS, "sampler", sampler).evaluations * (steps - 1) + 1


def initial_noise(schedule: Schedule, noise: NoiseFn, t: float = 1.0) -> Tensor:
    """Initial noise for sampling, with the variance alpha^2 + sigma^2 that unit-variance latents have at time t."""
    alpha, sigma = schedule(t)
    return float(torch.hypot(alpha, sigma)) * noise()
