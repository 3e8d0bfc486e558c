"""Time grids for samplers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.core.schedule import Schedule
from sfumato.errors import UserError
from sfumato.registry import choose

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
    low, high = schedule.logsnr(torch.tensor([t_max, t_min])).clamp(*limits)
    inner = (
        steps if schedule.inverse_logsnr(high) > t_min + 1e-9 else steps + 1
    )  # t_min outside the range: one more step
    u = torch.linspace(0, 1, inner, dtype=torch.float64)
    grid = torch.cat([schedule.inverse_logsnr(interpolate(low, high, u)), u.new_full((steps + 1 - inner,), t_min)])
    grid[0], grid[-1] = t_max, t_min
    return grid
