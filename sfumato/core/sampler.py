r"""Samplers: one loop over noise levels; a sampler is a step rule with explicit state.

A denoiser gives $\hat z$, and with it $\hat\epsilon = (z_t - \alpha_t \hat z) / \sigma_t$. The probability flow is
$dz = \hat z \, d\alpha + \hat\epsilon \, d\sigma$. The rules use increments of alpha and sigma, not of t, so none
depends on how the schedule is parametrised in t. The step that ends at t = 0 returns $\hat z$.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.core.denoiser import Denoise
from sfumato.core.schedule import NoiseLevel, Schedule, append_dims, append_dims_as
from sfumato.errors import UserError
from sfumato.registry import choose

NoiseFn = Callable[[], Tensor]


class SolverState(NamedTuple):
    """The state of a multistep sampler: start of the last step, z_hat there, and z_hat one step earlier."""

    level: NoiseLevel
    z: Tensor
    z_hat: Tensor
    previous: tuple[NoiseLevel, Tensor] | None  # one step earlier


State = SolverState | None
StepResult = tuple[Tensor, State, Tensor]
Transition = Callable[[Tensor, Tensor, NoiseLevel, NoiseLevel, NoiseFn | None], Tensor]


class Step(Protocol):
    """One step of a sampler from time t to time s < t.

    Args:
        denoise: (z, level) -> z_hat, with conditions and guidance bound.
        z: Noisy latents (B, ...) at time t, float32.
        at_t: The current noise level: a scalar, (B,), or any shape that broadcasts with the leading axes of z.
        at_s: The next noise level, in the same shape.
        noise: Draws standard normal noise in the shape of z; only stochastic samplers call it.
        state: The state that the last step returned; None at first.

    Returns:
        z at time s, the new state, and z_hat at time t.
    """

    def __call__(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult: ...


def _ddim_step(z: Tensor, z_hat: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None = None) -> Tensor:
    r"""Deterministic: $z_s = (\sigma_s / \sigma_t) z_t + (\alpha_s - \alpha_t \sigma_s / \sigma_t) \hat z$."""
    ratio = at_s.sigma / at_t.sigma
    return append_dims_as(ratio, z) * z + append_dims_as(at_s.alpha - ratio * at_t.alpha, z) * z_hat


def _ancestral_step(z: Tensor, z_hat: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None) -> Tensor:
    r"""Sample from the posterior $q(z_s | z_t, \hat z)$, with $e^{-h} = (\sigma_s / \alpha_s) (\alpha_t / \sigma_t)$.

    $z_s = (\sigma_s / \sigma_t) e^{-h} z_t + \alpha_s (1 - e^{-2h}) \hat z + \sigma_s \sqrt{1 - e^{-2h}} w$.
    """
    if noise is None:
        raise ValueError("a stochastic sampler (ddpm, sde) needs `noise`")
    ratio = at_s.sigma / at_t.sigma
    decay = ratio * at_t.alpha / at_s.alpha  # e^-h
    variance = 1 - decay**2
    mean = append_dims_as(ratio * decay, z) * z + append_dims_as(at_s.alpha * variance, z) * z_hat
    return mean + append_dims_as(at_s.sigma * variance.sqrt(), z) * noise().to(z)


class Sampler(ABC):
    """A `Step` that handles the ends: at s = 0 it returns z_hat, and parts with s = t stay as they are."""

    evaluations = 1  # denoiser evaluations per step; the last step, to s = 0, always takes one

    @property
    def stochastic(self) -> bool:
        """Whether steps draw new noise, so that the start does not determine the result."""
        return False

    @abstractmethod
    def advance(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        """The step for s > 0."""

    def __call__(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        ends, still = at_s.t <= 0, at_s.t == at_t.t
        if state is not None and (~still & (state.level.t == at_t.t)).any():
            state = None  # a part starts that stayed in the last step, so there is no step to continue from
        if (ends | still).all():
            z_s = z_hat = denoise(z, at_t)
            state = None
        else:
            z_s, state, z_hat = self.advance(denoise, z, at_t, at_s, noise, state)
            if ends.any():
                z_s = torch.where(append_dims(ends, z), z_hat, z_s)
        if still.any():
            z_s = torch.where(append_dims(still, z), z, z_s)
        return z_s, state, z_hat


@dataclass(frozen=True)
class Heun(Sampler):
    r"""Second order, two evaluations per step: the trapezoidal rule on $\hat z$ and $\hat\epsilon$.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364 (algorithm 1, without churn).
    """

    evaluations = 2

    def advance(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_hat = denoise(z, at_t)
        z_s = _ddim_step(z, z_hat, at_t, at_s)
        z_hat_s = denoise(z_s, at_s)
        eps = append_dims_as(1 / at_t.sigma, z) * z - append_dims_as(at_t.alpha / at_t.sigma, z) * z_hat
        eps_s = append_dims_as(1 / at_s.sigma, z) * z_s - append_dims_as(at_s.alpha / at_s.sigma, z) * z_hat_s
        dalpha, dsigma = (
            append_dims_as((at_s.alpha - at_t.alpha) / 2, z),
            append_dims_as((at_s.sigma - at_t.sigma) / 2, z),
        )
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
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_hat = z_hat_mid = denoise(z, at_t)
        if self.order == 1:
            return self.transition(z, z_hat, at_t, at_s, noise), None, z_hat
        if state is not None:
            half_step_ratio = (at_s.logsnr - at_t.logsnr) / (2 * (at_t.logsnr - state.level.logsnr))
            z_hat_mid = z_hat + append_dims_as(half_step_ratio, z) * (z_hat - state.z_hat)
            z = _unic_step(state, at_t, z_hat) if self.corrector else z
        previous = None if state is None else (state.level, state.z_hat)
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
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_hat = denoise(z, at_t)
        if state is None:
            return _ddim_step(z, z_hat, at_t, at_s), SolverState(at_t, z, z_hat, None), z_hat
        slope = append_dims_as(1 / (_angle(at_t) - _angle(state.level)), z) * (z_hat - state.z_hat)
        z = _adams_step(state.z, state.z_hat, slope, state.level, at_t)
        return _adams_step(z, z_hat, slope, at_t, at_s), SolverState(at_t, z, z_hat, None), z_hat


def _angle(level: NoiseLevel) -> Tensor:
    return torch.atan2(level.sigma, level.alpha)


def _adams_step(z: Tensor, z_hat: Tensor, slope: Tensor, at_t: NoiseLevel, at_s: NoiseLevel) -> Tensor:
    """From t to s, where z_hat changes by `slope` per radian."""
    dphi = _angle(at_s) - _angle(at_t)
    log_sine_ratio = (_angle(at_s).sin() / _angle(at_t).sin()).log()
    return _ddim_step(z, z_hat, at_t, at_s) + append_dims_as(dphi * at_s.alpha - log_sine_ratio * at_s.sigma, z) * slope


def _unic_step(state: SolverState, at_t: NoiseLevel, z_hat: Tensor) -> Tensor:
    """The corrector UniC: repeat the last step with z_hat at its end."""
    if state.previous is None:
        return _ddim_step(state.z, torch.lerp(state.z_hat, z_hat, 0.5), state.level, at_t)
    level, previous = state.previous
    h = (at_t.logsnr - state.level.logsnr) / 2
    r = (level.logsnr - state.level.logsnr) / (2 * h)
    phi_1 = torch.expm1(-h)
    b_1 = (phi_1 / -h - 1) / phi_1
    b_2 = 2 * ((phi_1 / -h - 1) / -h - 0.5) / phi_1
    rho = (b_1 - b_2) / (1 - r)  # weight of the previous difference, divided by r below
    correction = append_dims_as(rho / r, z_hat) * (previous - state.z_hat) + append_dims_as(b_1 - rho, z_hat) * (
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


class SamplingStep(NamedTuple):
    """A step that a sampler has taken.

    Attributes:
        level: The noise level where it ended.
        z: The latents there (B, ...).
        z_hat: The denoiser's output at its start (B, ...).
    """

    level: NoiseLevel
    z: Tensor
    z_hat: Tensor


def steps(
    denoise: Denoise,
    levels: Sequence[NoiseLevel],
    z: Tensor,
    sampler: str | Step = "heun",
    noise: NoiseFn | None = None,
) -> Iterator[SamplingStep]:
    """Run a sampler along noise levels, step by step. Use it under `torch.no_grad()` unless you need gradients.

    Args:
        denoise: (z, level) -> z_hat, with conditions and guidance bound.
        levels: Noise levels from noise to data, as from `Schedule.levels`: scalars, or shapes that broadcast with the
            leading axes of z, for a time per item, token or segment.
        z: Initial noisy latents (B, ...), at the first level.
        sampler: A name in `SAMPLERS`, or a step rule.
        noise: Draws noise in the shape of z, for stochastic samplers.

    Yields:
        Each step taken.

    Raises:
        UserError: Unknown sampler.
    """
    step = choose(SAMPLERS, "sampler", sampler) if isinstance(sampler, str) else sampler
    z, state = z.to(torch.promote_types(z.dtype, torch.float32)), None
    for at_t, at_s in pairwise(levels):
        z, state, z_hat = step(denoise, z, at_t, at_s, noise, state)
        yield SamplingStep(at_s, z, z_hat)


def sample(
    denoise: Denoise,
    levels: Sequence[NoiseLevel],
    z: Tensor,
    sampler: str | Step = "heun",
    noise: NoiseFn | None = None,
) -> Tensor:
    """The last latents (B, ...) of `steps`, float32 (float64 if z is); at time 0 they are the last z_hat."""
    for step in steps(denoise, levels, z, sampler, noise):
        z = step.z
    return z


def denoiser_evaluations(sampler: str, steps: int) -> int:
    """Number of denoiser evaluations of a sampler on a grid that ends at t = 0."""
    return choose(SAMPLERS, "sampler", sampler).evaluations * (steps - 1) + 1


def initial_noise(level: NoiseLevel, noise: NoiseFn) -> Tensor:
    """Initial noise for sampling, with the variance alpha^2 + sigma^2 that unit-variance latents have at a level."""
    eps = noise()
    return append_dims_as(torch.hypot(level.alpha, level.sigma), eps) * eps


NOISE_RATIO_MIN, NOISE_RATIO_MAX = 0.002, 80.0  # range of sigma / alpha in EDM, and of the `LOGSNR_SPACINGS`


def _karras(low: Tensor, high: Tensor, u: Tensor, rho: float = 7.0) -> Tensor:
    first, last = torch.exp(-low / (2 * rho)), torch.exp(-high / (2 * rho))  # (sigma / alpha)^(1 / rho)
    return -2 * rho * torch.lerp(first, last, u).log()


def _both_ends(u: Tensor) -> Tensor:
    return (u + torch.sin(u * (math.pi / 2)) ** 2) / 2


def _toward_noise(u: Tensor) -> Tensor:
    return 1 - (1 - u).sqrt()


def _toward_data(u: Tensor) -> Tensor:
    return 1 - (1 - u) ** 1.5


TIME_WARPS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "both_ends": _both_ends,
    "noise": _toward_noise,
    "data": _toward_data,
}
"""Grids in t: step fraction u -> fraction of the way from t_max to t_min."""

LOGSNR_SPACINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"logsnr": torch.lerp, "karras": _karras}
"""Grids in the log-SNR: (lowest, highest, step fraction u) -> log-SNR."""

GRIDS = (*TIME_WARPS, *LOGSNR_SPACINGS)


def time_grid(
    schedule: Schedule, steps: int, spacing: str = "uniform", t_max: float = 1.0, t_min: float = 0.0
) -> Tensor:
    """Decreasing times from t_max to t_min, (steps + 1,), float64.

    Args:
        schedule: The noise schedule.
        steps: Number of steps, at least 1.
        spacing: `uniform` in t; `both_ends`, the mean of a uniform grid and a cosine one, finer at both ends; `noise`
            (t^2 uniform) and `data` (t^(2/3) uniform), finer at that end, for consistency steps; `logsnr`, uniform in
            the log signal-to-noise ratio; or `karras`, uniform in (sigma / alpha)^(1/7). The last two cover
            sigma / alpha in [0.002, 80] and add t_max and t_min unchanged.
        t_max: First time.
        t_min: Last time.

    Raises:
        UserError: The spacing is unknown, or steps is below 1.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if spacing in TIME_WARPS:
        u = TIME_WARPS[spacing](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        return torch.lerp(u.new_tensor(t_max), u.new_tensor(t_min), u)
    interpolate = LOGSNR_SPACINGS[choose({name: name for name in GRIDS}, "time grid", spacing)]
    limits = -2 * math.log(NOISE_RATIO_MAX), -2 * math.log(NOISE_RATIO_MIN)
    low, high = schedule(torch.tensor([t_max, t_min])).logsnr.clamp(*limits)
    inner = (
        steps if schedule.inverse_logsnr(high) > t_min + 1e-9 else steps + 1
    )  # t_min outside the range: one more step
    u = torch.linspace(0, 1, inner, dtype=torch.float64)
    grid = torch.cat([schedule.inverse_logsnr(interpolate(low, high, u)), u.new_full((steps + 1 - inner,), t_min)])
    grid[0], grid[-1] = t_max, t_min
    return grid
