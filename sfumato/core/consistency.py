r"""Consistency models: the end of the probability flow in one network evaluation, and trajectories to learn it from.

A network with a second time input s returns for s = 0 the consistency function $f(z_t, t)$, the end of the flow
through z_t, and for s = t the posterior mean $E[z | z_t]$. Multistep sampling adds noise to f and evaluates it again;
the noise covers the error of the step before.

References:
    Song et al., Consistency Models, https://arxiv.org/abs/2303.01469 (definition 1 and algorithm 1); Kim et al.,
    Consistency Trajectory Models, https://arxiv.org/abs/2310.02279 (one network for f and for the denoiser).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.core.denoiser import Denoise
from sfumato.core.sampler import SAMPLERS, NoiseFn, Sampler, State, StepResult
from sfumato.core.schedule import NoiseLevel, append_dims


@dataclass(frozen=True)
class ConsistencyStep(Sampler):
    r"""Evaluate f, then add new noise up to time s: $z_s = \alpha_s f(z, t) + \sigma_s w$; at s = 0 return f.

    Args:
        consistency: (z, level) -> f(z, t); replaces the denoiser.
    """

    consistency: Denoise

    @property
    def stochastic(self) -> bool:
        return True

    def advance(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        if noise is None:
            raise ValueError("consistency steps need `noise`")
        z_hat = denoise(z, at_t)
        return at_s.add_noise(z_hat, noise().to(z)), None, z_hat

    def __call__(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        return super().__call__(self.consistency, z, at_t, at_s, noise, state)


@dataclass
class Trajectories:
    """Solutions of the probability flow of N items, each at its own K + 1 times.

    Args:
        grid: Decreasing times (K + 1, N), float64.
        z: Noisy latents (K + 1, N, ...).
        z_hat: The denoiser's output at the first K of them (K, N, ...).
    """

    grid: Tensor
    z: Tensor
    z_hat: Tensor

    def __len__(self) -> int:
        return self.z.shape[1]

    @property
    def steps(self) -> int:
        """The number K of steps."""
        return len(self.z_hat)

    def training_pairs(self, item: Tensor, step: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training pairs: a latent on a trajectory and its end, or, for an anchor, the denoiser's output there.

        Args:
            item: Number of the trajectory (B,).
            step: Number of the time (B,), below K.
            anchor: Whether the target is the denoiser's output, at s = t (B,), bool.

        Returns:
            z (B, ...), its time t (B,), the time s (B,) of the target (0, or t for an anchor), the target (B, ...).
        """
        t, end = self.grid[step, item], self.grid[-1, item]
        target = torch.where(append_dims(anchor, self.z[0]), self.z_hat[step, item], self.z[-1, item])
        return self.z[step, item], t, torch.where(anchor, t, end), target


def concat(parts: list[Trajectories]) -> Trajectories:
    """Join several sets of trajectories."""
    fields = zip(*((part.grid, part.z, part.z_hat) for part in parts), strict=True)
    return Trajectories(*(torch.cat(tensors, 1) for tensors in fields))


def jitter(grid: Tensor, shift: Tensor) -> Tensor:
    """Shift all times of a grid (K + 1,) but its ends by the fraction `shift` (N,) of a step, giving (K + 1, N).

    With shifts uniform over [-1/2, 1/2], all times are equally likely, except near the ends.
    """
    inner = torch.arange(1, len(grid) - 1)[:, None] + shift.double()  # (K - 1, N)
    below = inner.floor().long()
    shifted = torch.lerp(grid[below], grid[below + 1], inner - below)
    ends = grid[[0, -1], None].expand(-1, len(shift))
    return torch.cat([ends[:1], shifted, ends[1:]])


def integrate_trajectories(denoise: Denoise, levels: Sequence[NoiseLevel], z: Tensor) -> Trajectories:
    """Solve the probability flow from z (N, ...) along K + 1 noise levels (N,) by UniPC: one evaluation per step.

    Stored latents include the corrector of the next evaluation, except the last one before the end.
    """
    step, state = SAMPLERS["unipc"], None
    latents: list[Tensor] = []
    z_hats: list[Tensor] = []
    for at_t, at_s in pairwise(levels):
        z_s, state, z_hat = step(denoise, z, at_t, at_s, None, state)
        latents.append(z if state is None else state.z)
        z_hats.append(z_hat)
        z = z_s
    return Trajectories(torch.stack([level.t for level in levels]), torch.stack([*latents, z]), torch.stack(z_hats))
