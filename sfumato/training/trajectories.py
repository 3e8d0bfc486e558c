"""Distillation data: states of the teacher's trajectories, and the training step that learns their ends."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sfumato.conditioners import Conditioner
from sfumato.core import Denoiser, Trajectories, step_generator
from sfumato.core.objective import masked_mean, squared
from sfumato.training.steps import Losses, Phase, TrainStep
from sfumato.types import Batch

PSEUDO_HUBER_C = 0.03  # c of the pseudo-Huber loss: root mean square error below which it is quadratic
NOISE_SHARE = 0.5  # share of training states at t = 1
ANCHOR_SHARE = 0.1  # share of training states whose target is ẑ (s = t)


@dataclass(kw_only=True)
class TrajectoryBatch(Batch):
    """States `data` (B, ...) of trajectories at times t (B,); targets (B, ...) are their ends (s = 0) or ẑ (s = t)."""

    t: Tensor
    s: Tensor
    target: Tensor


class DistillationStep(TrainStep):
    r"""Train a denoiser to predict the ends of trajectories.

    Pseudo-Huber loss $\sqrt{\| \hat z(z_t, t, s) - target \|^2 / d + c^2}$ on latents of d numbers. Where the end is
    ambiguous, as between two classes, the squared error would have its largest gradient, towards the mean of both.

    Args:
        denoiser: A denoiser with a second time input s.
        conditioner: Labels -> condition of the network.

    References:
        Song and Dhariwal, https://arxiv.org/abs/2310.14189 (section 3.3, the pseudo-Huber loss of consistency models).
    """

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    @property
    def ema_module(self) -> nn.Module:
        return nn.ModuleDict({"denoiser": self.denoiser, "conditioner": self.conditioner})

    def phases(self) -> list[Phase]:
        return [Phase("jump", list(self.ema_module.parameters()))]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        assert isinstance(batch, TrajectoryBatch)
        cond = self.conditioner(batch.label, len(batch.data))
        z_hat = self.denoiser(batch.data, batch.t, cond, s=batch.s)
        return {"loss": (masked_mean(squared(z_hat, batch.target)) + PSEUDO_HUBER_C**2).sqrt().mean()}


class TrajectoryBatches:
    """Batches of states of the teacher's trajectories.

    Half of them are at t = 1, where sampling starts, the others at random steps. For most, the target is the end of the
    trajectory; for a few it is ẑ, so that the network remains a denoiser.

    Args:
        trajectories: The trajectories.
        label: Their class numbers (N,), or None.
        batch: Batch size.
        seed: Random seed.
        device: Device of the batches.
    """

    def __init__(self, trajectories: Trajectories, label: Tensor | None, batch: int, seed: int, device: str) -> None:
        self.trajectories, self.label = trajectories, label
        self.size, self.seed, self.device = batch, seed, device

    def batch(self, step: int) -> TrajectoryBatch:
        """The batch of a step."""
        generator = step_generator(self.seed, "distill/jumps", step)
        item = torch.randint(len(self.trajectories), (self.size,), generator=generator)
        noise, position, anchor = torch.rand(3, self.size, generator=generator)
        index = torch.where(noise < NOISE_SHARE, 0, (position * self.trajectories.steps).long())
        z, t, s, target = self.trajectories.training_pairs(item, index, anchor < ANCHOR_SHARE)
        label = None if self.label is None else self.label[item]
        return TrajectoryBatch(data=z.to(self.device), index=item, label=label, t=t, s=s, target=target.to(self.device))
