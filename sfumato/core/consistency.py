r"""Where the probability flow ends, in one call of the network; and the trajectories that this is learned from.

A network that is told a second time s as well gives for s = 0 the end $f(z_t, t)$ of the flow that leads through z_t,
and for s = t $E[z | z_t]$ as ever. Noised anew, an end is as good a place to jump from as one that was reached
otherwise: what the jump before had missed is covered by the noise.

References:
    Song et al., Consistency Models, https://arxiv.org/abs/2303.01469 (definition 1 and algorithm 1); Kim et al.,
    Consistency Trajectory Models, https://arxiv.org/abs/2310.02279 (one network for f and for the denoiser).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import aligned, trail
from .sampler import SAMPLERS, Ask, Denoise, Draw, Knot, Rule, State, Stepped
from .schedule import Schedule, time


@dataclass(frozen=True)
class Jump(Rule):
    r"""To the flow's end and, unless it is there, back to time s with new noise: $z_s = \alpha_s f(z, t) + \sigma_s w$.

    Args:
        end: (z, t) -> f(z, t); it is asked in place of the denoiser.
    """

    end: Denoise

    @property
    def stochastic(self) -> bool:
        return True

    def advance(self, ask: Ask, z: Tensor, now: Knot, then: Knot, noise: Draw | None, state: State) -> Stepped:
        if noise is None:
            raise ValueError("jumps need `noise`")
        z_hat = ask(z, now)
        return trail(then.alpha, z) * z_hat + trail(then.sigma, z) * noise().to(z), None, z_hat

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped:
        return super().__call__(self.end, schedule, z, t, s, noise, state)


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

    def at(self, item: Tensor, knot: Tensor, still: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of some trajectories and where they lead, or, of those that are `still`, what the denoiser said there.

        Args:
            item: Whose (B,).
            knot: The number of the time (B,), below K.
            still: Which are still (B,).

        Returns:
            z (B, ...), its time t and the time s (B,) of the target: 0, or t; and the target (B, ...).
        """
        t, end = self.grid[knot, item], self.grid[-1, item]
        target = torch.where(aligned(still, self.z[0]), self.z_hat[knot, item], self.z[-1, item])
        return self.z[knot, item], t, torch.where(still, t, end), target


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

    Its states are stored as corrected by the call after them, all but the last one but one.
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
