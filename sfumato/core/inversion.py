r"""Inversion: from data to the noise they come from, and back, along the probability flow.

The flow is followed between t = 1 and a time where $\sigma / \alpha$ is small but not zero: the last step of a sampler
returns $\hat z$, and that cannot be undone. A solver's step is undone by solving for where it came from, so that
inversion and regeneration are inverses of each other at any number of steps, not only in the limit of many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .denoiser import trail
from .sampler import SAMPLERS, Denoise, Draw, State, Step, Stepped, sample, time_grid
from .schedule import Schedule

NEAR = 0.01  # sigma / alpha where inversion starts: noise that is not seen
ROUNDS = 24  # of the fixed point, at most
CLOSE = 2e-6  # relative residual at which it has converged; float32 cannot do much better
WINDOW = 4  # differences that Anderson's acceleration looks at
_RIDGE = 1e-10


def flow_grid(schedule: Schedule, steps: int, t_max: float = 1.0, near: float = NEAR) -> Tensor:
    r"""Falling times (steps + 1,) from t_max to where $\sigma / \alpha$ is `near`, even in its logarithm.

    Neighbouring times differ little in sigma, which is what makes a step easy to undo.
    """
    return time_grid(schedule, steps, "logsnr", t_max, float(schedule.inverse(-2 * math.log(near))))


def relative(gap: Tensor, z: Tensor) -> Tensor:
    """|gap| / |z| of each item: (B, ...) -> (B,)."""
    over, under = (x.reshape(len(x), -1).square().sum(1) for x in (gap, z))
    return (over / under.clamp_min(1e-30)).sqrt()


def fixed_point(g: Callable[[Tensor], Tensor], z: Tensor, rounds: int = ROUNDS, close: float = CLOSE) -> Tensor:
    """Solve z = g(z) by Anderson's acceleration, each item (B, ...) with its own history.

    Args:
        g: The map, (B, ...) to the same.
        z: Where to start (B, ...).
        rounds: Calls of g, at most.
        close: Stops when |g(z) - z| <= close |z| for every item.

    References:
        Walker and Ni, Anderson Acceleration for Fixed-Point Iterations, SIAM J. Numer. Anal. 49 (2011), eq. 2.1.
    """
    states: list[Tensor] = []
    gaps: list[Tensor] = []
    for _ in range(rounds):
        states.append(z.reshape(len(z), -1))
        gaps.append(g(z).reshape(len(z), -1) - states[-1])
        if not len(z) or float(relative(gaps[-1], states[-1]).max()) <= close:
            break
        z = _mixed(states[-WINDOW - 1 :], gaps[-WINDOW - 1 :]).reshape(z.shape)
    return z


def _mixed(states: list[Tensor], gaps: list[Tensor]) -> Tensor:
    """The next state (B, n): where the gaps, continued linearly, are smallest."""
    step = states[-1] + gaps[-1]
    if len(states) == 1:
        return step
    d_gap = torch.stack(gaps, -1).diff(dim=-1).double()  # (B, n, m)
    d_state = torch.stack(states, -1).diff(dim=-1).double()
    gram = d_gap.mT @ d_gap
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    pulled = d_gap.mT @ gaps[-1].double()[..., None]
    weights = cast("Tensor", torch.linalg.solve(gram, pulled))  # pyright: ignore[reportUnknownMemberType]
    return step - ((d_state + d_gap) @ weights)[..., 0].to(step.dtype)


@dataclass(frozen=True)
class Undo:
    r"""A `Step` towards noise, t -> s > t: finds the $z_s$ from which `step` arrives at $z_t$.

    $z_s = z_s + z_t - \mathrm{step}(z_s; s \to t)$, begun with the step taken the other way round.

    Args:
        step: A deterministic rule without memory: `ddim` or `heun`.
    """

    step: Step

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped:
        guess, _, z_hat = self.step(denoise, schedule, z, t, s, noise, None)

        def corrected(z_s: Tensor) -> Tensor:
            return z_s + z - self.step(denoise, schedule, z_s, s, t, noise, None)[0]

        return fixed_point(corrected, guess), None, z_hat


def invert(denoise: Denoise, schedule: Schedule, z: Tensor, grid: Tensor) -> Tensor:
    """The state at time grid[0] from which Heun's rule, along the same grid, arrives at z.

    Args:
        denoise: (z, t) -> z_hat, under the condition of z.
        schedule: The path.
        z: Data (B, ...); they are taken for the flow's state at grid[-1], up to the factor alpha.
        grid: Falling times that end above 0, as from `flow_grid`.

    Returns:
        (B, ...), with the variance alpha^2 + sigma^2 of noise where grid[0] is 1.

    References:
        Song et al., DDIM, https://arxiv.org/abs/2010.02502 (section 4.3); Pan et al., Effective Real Image Editing with
        Accelerated Iterative Diffusion Inversion, https://arxiv.org/abs/2309.04907 (fixed points, Anderson).
    """
    alpha = trail(schedule.alpha(grid[-1:]), z)
    return sample(denoise, schedule, alpha * z, grid.flip(0), Undo(SAMPLERS["heun"]))


def regenerate(denoise: Denoise, schedule: Schedule, z: Tensor, grid: Tensor, sampler: str = "heun") -> Tensor:
    """Data (B, ...) from a state z at time grid[0]: what undoes `invert` on the same grid, under the same condition."""
    alpha = trail(schedule.alpha(grid[-1:]), z)
    return sample(denoise, schedule, z, grid, sampler) / alpha


def slerp(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    r"""Points on the great circle from a to b: $\frac{\sin((1 - w) \theta) a + \sin(w \theta) b}{\sin \theta}$.

    Noise has its norm nearly fixed, and a straight line between two draws leaves that shell.

    Args:
        a: One item (...); theta is its angle to b. Where both point the same way the line is straight.
        b: The other (...).
        w: Shares of b (F,), from 0 to 1.

    Returns:
        (F, ...); exactly a at w = 0 and exactly b at w = 1.

    References:
        Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985 (section 3.3).
    """
    x, y = a.flatten().double(), b.flatten().double()
    cosine: Tensor = x @ y / ((x @ x) * (y @ y)).sqrt().clamp_min(1e-30)
    theta = torch.acos(cosine.clamp(-1, 1))
    w = w.to(x)[:, None]
    share_a, share_b = torch.sin((1 - w) * theta), torch.sin(w * theta)
    scale = torch.sin(theta)
    points = (share_a * x + share_b * y) / scale if scale > 1e-4 else torch.lerp(x, y, w)
    points = torch.where(w <= 0, x, torch.where(w >= 1, y, points))
    return points.to(a.dtype).reshape(-1, *a.shape)
