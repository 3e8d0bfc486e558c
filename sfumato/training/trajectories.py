"""Distillation data: states of the teacher's trajectories, and the training step that learns their ends."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sfumato.core import Trajectories, TrajectoryDenoiser, step_generator
from sfumato.core.schedule import masked_mean
from sfumato.model import ConditionalDenoiser
from sfumato.training.steps import Losses, Phase, TrainStep
from sfumato.types import Batch, Raw

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
        model: A denoiser with a second time input s, and its conditioner.

    References:
        Song and Dhariwal, https://arxiv.org/abs/2310.14189 (section 3.3, the pseudo-Huber loss of consistency models).
    """

    def __init__(self, model: ConditionalDenoiser) -> None:
        super().__init__()
        self.model = model

    @property
    def ema_module(self) -> nn.Module:
        return self.model

    def phases(self) -> list[Phase]:
        return [Phase("jump", list(self.model.parameters()))]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        denoiser = self.model.denoiser
        assert isinstance(batch, TrajectoryBatch) and isinstance(denoiser, TrajectoryDenoiser)
        cond, schedule = self.model.conditioner(batch.raw, len(batch.data)), denoiser.schedule
        z_hat = denoiser(batch.data, schedule(batch.t), cond, end=schedule(batch.s))
        return {"loss": (masked_mean((z_hat - batch.target) ** 2) + PSEUDO_HUBER_C**2).sqrt().mean()}


class TrajectoryBatches:
    """Batches of states of the teacher's trajectories.

    Half of them are at t = 1, where sampling starts, the others at random steps. For most, the target is the end of the
    trajectory; for a few it is ẑ, so that the network remains a denoiser.

    Args:
        trajectories: The trajectories.
        raw: Their conditions.
        batch: Batch size.
        seed: Random seed.
        device: Device of the batches.
    """

    def __init__(self, trajectories: Trajectories, raw: Raw, batch: int, seed: int, device: str) -> None:
        self.trajectories, self.raw = trajectories, raw
        self.size, self.seed, self.device = batch, seed, device

    def batch(self, step: int) -> TrajectoryBatch:
        """The batch of a step."""
        generator = step_generator(self.seed, "distill/jumps", step)
        item = torch.randint(len(self.trajectories), (self.size,), generator=generator)
        noise, position, anchor = torch.rand(3, self.size, generator=generator)
        index = torch.where(noise < NOISE_SHARE, 0, (position * self.trajectories.steps).long())
        z, t, s, target = self.trajectories.training_pairs(item, index, anchor < ANCHOR_SHARE)
        raw, device = self.raw.select(item), self.device
        return TrajectoryBatch(data=z.to(device), index=item, raw=raw, t=t, s=s, target=target.to(device))
