r"""Inversion: from data to its noise, and back, along the probability flow, by fixed-point iteration per step.

The flow runs between t = 1 and a time where $\sigma / \alpha$ is small but not zero, because a sampler's last step
returns $\hat z$ and is not invertible. Each solver step is inverted by solving for its start, so inversion and
reconstruction are inverse to each other at any number of steps, not only in the limit of many.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sfumato.core.denoiser import Denoise
from sfumato.core.sampler import SAMPLERS, NoiseFn, State, Step, StepResult, sample, time_grid
from sfumato.core.schedule import NoiseLevel, Schedule, append_dims_as

MIN_NOISE_RATIO = 0.01  # sigma / alpha where inversion starts: invisible noise
MAX_FIXED_POINT_ITERATIONS = 24  # per solver step
FIXED_POINT_TOLERANCE = 2e-6  # relative residual at convergence; float32 cannot do much better
ANDERSON_WINDOW = 4  # differences of past iterates that Anderson acceleration uses
ANDERSON_RIDGE = 1e-10  # ridge of its least squares, relative to the trace of the Gram matrix


def inversion_grid(schedule: Schedule, steps: int, t_max: float = 1.0, noise_ratio: float = MIN_NOISE_RATIO) -> Tensor:
    r"""Decreasing times (steps + 1,), uniform in log-SNR, from t_max to where $\sigma / \alpha$ is `noise_ratio`.

    Neighbouring times have similar sigma, which makes a step easy to invert.
    """
    return time_grid(schedule, steps, "logsnr", t_max, float(schedule.inverse_logsnr(-2 * math.log(noise_ratio))))


def relative_error(residual: Tensor, z: Tensor) -> Tensor:
    """|residual| / |z| of each item: (B, ...) -> (B,)."""
    numerator, denominator = (x.reshape(len(x), -1).square().sum(1) for x in (residual, z))
    return (numerator / denominator.clamp_min(1e-30)).sqrt()


def fixed_point(
    g: Callable[[Tensor], Tensor],
    z: Tensor,
    max_iterations: int = MAX_FIXED_POINT_ITERATIONS,
    tolerance: float = FIXED_POINT_TOLERANCE,
) -> Tensor:
    """Solve z = g(z) by fixed-point iteration with Anderson acceleration, separately for each item (B, ...).

    Args:
        g: The map, (B, ...) -> (B, ...).
        z: Initial value (B, ...).
        max_iterations: Largest number of calls of g.
        tolerance: Stop when |g(z) - z| <= tolerance |z| for every item.

    References:
        Walker and Ni, Anderson Acceleration for Fixed-Point Iterations, SIAM J. Numer. Anal. 49 (2011), eq. 2.1.
    """
    iterates: list[Tensor] = []
    residuals: list[Tensor] = []
    for _ in range(max_iterations):
        iterates.append(z.reshape(len(z), -1))
        residuals.append(g(z).reshape(len(z), -1) - iterates[-1])
        if not len(z) or float(relative_error(residuals[-1], iterates[-1]).max()) <= tolerance:
            break
        z = _anderson_step(iterates[-ANDERSON_WINDOW - 1 :], residuals[-ANDERSON_WINDOW - 1 :]).reshape(z.shape)
    return z


def _anderson_step(iterates: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """The next iterate (B, n): past ones combined for the smallest extrapolated residual, plus that residual."""
    plain = iterates[-1] + residuals[-1]
    if len(iterates) == 1:
        return plain
    d_residual = torch.stack(residuals, -1).diff(dim=-1).double()  # (B, n, m)
    d_iterate = torch.stack(iterates, -1).diff(dim=-1).double()
    gram = d_residual.mT @ d_residual
    ridge = ANDERSON_RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    rhs = d_residual.mT @ residuals[-1].double()[..., None]
    weights = cast("Tensor", torch.linalg.solve(gram, rhs))  # pyright: ignore[reportUnknownMemberType]
    return plain - ((d_iterate + d_residual) @ weights)[..., 0].to(plain.dtype)


@dataclass(frozen=True)
class InverseStep:
    r"""A `Step` toward noise, t -> s > t: finds the $z_s$ that `step` takes to $z_t$.

    $z_s = z_s + z_t - \mathrm{step}(z_s; s \to t)$, initialised with the step in the opposite direction.

    Args:
        step: A deterministic one-step method: `ddim` or `heun`.
    """

    step: Step

    def __call__(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        initial, _, z_hat = self.step(denoise, z, at_t, at_s, noise, None)

        def correct(z_s: Tensor) -> Tensor:
            return z_s + z - self.step(denoise, z_s, at_s, at_t, noise, None)[0]

        return fixed_point(correct, initial), None, z_hat


def invert(denoise: Denoise, levels: Sequence[NoiseLevel], z: Tensor) -> Tensor:
    """The noisy latents at the first level that Heun's method takes to z along the levels.

    Args:
        denoise: (z, level) -> z_hat, under the condition of z.
        levels: Noise levels from noise to data that end above t = 0, as those of an `inversion_grid`.
        z: Clean latents (B, ...); alpha z is taken as the flow's value at the last level.

    Returns:
        (B, ...), with the variance alpha^2 + sigma^2 of `initial_noise` if the first level is at t = 1.

    References:
        Song et al., DDIM, https://arxiv.org/abs/2010.02502 (section 4.3); Pan et al., Effective Real Image Editing with
        Accelerated Iterative Diffusion Inversion, https://arxiv.org/abs/2309.04907 (fixed points, Anderson).
    """
    alpha = append_dims_as(levels[-1].alpha, z)
    return sample(denoise, levels[::-1], alpha * z, InverseStep(SAMPLERS["heun"]))


def integrate_to_data(denoise: Denoise, levels: Sequence[NoiseLevel], z: Tensor, sampler: str = "heun") -> Tensor:
    """Clean latents (B, ...) from z at the first level; the inverse of `invert` on the same levels and condition."""
    return sample(denoise, levels, z, sampler) / append_dims_as(levels[-1].alpha, z)


def slerp(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    r"""Spherical linear interpolation, $\frac{\sin((1 - w) \theta) a + \sin(w \theta) b}{\sin \theta}$.

    The norm of Gaussian noise is nearly constant; a straight line between two samples leaves that sphere.

    Args:
        a: First item (...); theta is its angle to b. If they are parallel, the interpolation is linear.
        b: Second item (...).
        w: Weights of b (F,), from 0 to 1.

    Returns:
        (F, ...); exactly a at w = 0 and exactly b at w = 1.

    References:
        Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985 (section 3.3).
    """
    x, y = a.flatten().double(), b.flatten().double()
    cosine: Tensor = x @ y / ((x @ x) * (y @ y)).sqrt().clamp_min(1e-30)
    theta = torch.acos(cosine.clamp(-1, 1))
    w = w.to(x)[:, None]
    weight_a, weight_b = torch.sin((1 - w) * theta), torch.sin(w * theta)
    scale = torch.sin(theta)
    points = (weight_a * x + weight_b * y) / scale if scale > 1e-4 else torch.lerp(x, y, w)
    points = torch.where(w <= 0, x, torch.where(w >= 1, y, points))
    return points.to(a.dtype).reshape(-1, *a.shape)
