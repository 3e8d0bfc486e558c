r"""Flow maps: where the probability flow takes z from time t to any time s < t, in one call of the network.

A denoiser that is told s as well gives the $\hat z$ with which the step of `ddim` lands where the flow does:
$X_{t,s}(z) = (\sigma_s / \sigma_t) \, z + (\alpha_s - \alpha_t \sigma_s / \sigma_t) \, \hat z(z, t, s)$.
At s = t that is $E[z | z_t]$ as ever, at s = 0 the end of the flow.

References:
    Boffi et al., Flow Map Matching, https://arxiv.org/abs/2406.07507 (definition 2.1 and proposition 2.4: the flow map
    and the velocity on its diagonal); Kim et al., Consistency Trajectory Models, https://arxiv.org/abs/2310.02279
    (eq. 5, the same parametrisation for the variance-exploding path).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import trail
from .sampler import SAMPLERS, Denoise, Draw, State, Stepped
from .schedule import Schedule, time

Toward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Jump:
    """A `Step` that lands where the flow does, however far away s is.

    Args:
        toward: (z, t, s) -> z_hat of the flow map; t and s have the leading axes of z.
    """

    toward: Toward

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped:
        return SAMPLERS["ddim"](lambda z, t: self.toward(z, t, s.expand(t.shape)), schedule, z, t, s, None, None)


def landing(schedule: Schedule, z: Tensor, z_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The z_hat (B, ...) with which `Jump` goes from z (B, ...) at times t (B,) to z_s (B, ...) at times s < t (B,)."""
    alpha, sigma = schedule(t)
    alpha_s, sigma_s = schedule(s)
    ratio = sigma_s / sigma
    reach = torch.where(s > 0, alpha_s - ratio * alpha, 1.0)  # the step that ends at 0 returns z_hat
    return (z_s - trail(torch.where(s > 0, ratio, 0.0), z) * z) / trail(reach, z)


@dataclass
class Trajectories:
    """Solutions of the probability flow of N items, at K + 1 times of each item's own.

    Args:
        grid: Falling times (K + 1, N), float64.
        z: States (K + 1, N, ...).
        z_hat: What the denoiser said at the first K of them (K, N, ...).
    """

    grid: Tensor
    z: Tensor
    z_hat: Tensor

    def __len__(self) -> int:
        return self.z.shape[1]

    @property
    def knots(self) -> int:
        """The number K of steps."""
        return len(self.z_hat)

    def leg(self, schedule: Schedule, item: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Part of some trajectories, from their time i < K to their time j >= i, all (B,).

        Returns:
            z (B, ...) at the beginning, its time t and that of the end s (B,), and the z_hat (B, ...) that leads there.
        """
        t, s, z = self.grid[i, item], self.grid[j, item], self.z[i, item]
        far = landing(schedule, z, self.z[j, item], t, torch.where(j > i, s, 0.0))
        return z, t, s, torch.where(trail((j > i).float(), z) > 0, far, self.z_hat[i, item])


def joined(parts: list[Trajectories]) -> Trajectories:
    """All trajectories of several sets."""
    along = zip(*((part.grid, part.z, part.z_hat) for part in parts), strict=True)
    return Trajectories(*(torch.cat(tensors, 1) for tensors in along))


def shaken(grid: Tensor, shift: Tensor) -> Tensor:
    """Times (K + 1, N) between those of a grid (K + 1,): all but the ends are moved by `shift` (N,) of a step.

    Over items whose shifts are spread over [-1/2, 1/2], every time but those near the ends comes up alike.
    """
    inner = torch.arange(1, len(grid) - 1)[:, None] + shift.double()  # (K - 1, N)
    below = inner.floor().long()
    moved = torch.lerp(grid[below], grid[below + 1], inner - below)
    ends = grid[[0, -1], None].expand(-1, len(shift))
    return torch.cat([ends[:1], moved, ends[1:]])


def fly(denoise: Denoise, schedule: Schedule, z: Tensor, grid: Tensor) -> Trajectories:
    """Follow the flow from z (N, ...) along falling times (K + 1, N), by UniPC: one call of the denoiser a step.

    Its predictions are stored as corrected by the call after them.
    """
    step, state = SAMPLERS["unipc"], None
    states: list[Tensor] = []
    z_hats: list[Tensor] = []
    for t, s in pairwise(time(grid)):
        end, state, z_hat = step(denoise, schedule, z, t, s, None, state)
        states.append(z if state is None else state.z)
        z_hats.append(z_hat)
        z = end
    return Trajectories(time(grid), torch.stack([*states, z]), torch.stack(z_hats))
