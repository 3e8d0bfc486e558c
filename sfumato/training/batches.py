"""Training batches: the items of a step depend only on the seed, the stage and the step's number."""

import torch
from torch import Tensor

from sfumato.config import StageSettings
from sfumato.core import step_generator
from sfumato.data.cache import IN_MEMORY
from sfumato.data.dataset import Dataset
from sfumato.types import Batch


class EpochSampler:
    """Item numbers of each step, from one random permutation per epoch.

    Args:
        count: Number of items.
        batch: Batch size.
        seed: Seed of the run.
        stage: Name of the stage.
    """

    def __init__(self, count: int, batch: int, seed: int, stage: str) -> None:
        self.count, self.batch, self.seed, self.stage = count, batch, seed, stage
        self.epochs: dict[int, Tensor] = {}

    def __getitem__(self, step: int) -> Tensor:
        """Item numbers of a step, (batch,)."""
        first, last = step * self.batch, (step + 1) * self.batch - 1
        epochs = range(first // self.count, last // self.count + 1)
        self.epochs = {k: self.epochs[k] if k in self.epochs else self._permutation(k) for k in epochs}
        # only the part of each epoch that the step needs: joining whole epochs would cost time linear in the data
        parts = ((max(first - k * self.count, 0), last - k * self.count + 1) for k in epochs)
        return torch.cat([self.epochs[k][a:b] for k, (a, b) in zip(epochs, parts, strict=True)])

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=step_generator(self.seed, f"{self.stage}/order", epoch))


class DataBatches:
    """Batches of data, read when needed."""

    def __init__(self, data: Dataset, settings: StageSettings, seed: int, stage: str, device: str) -> None:
        self.data, self.device = data, torch.device(device)
        self.order = EpochSampler(len(data), settings.batch or 1, seed, stage)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        batch = self.data.batch(self.order[step])
        batch.data = batch.data.to(self.device)
        return batch


class LatentBatches:
    """Batches of latents (N, *latent_shape) and labels (N,); latents above `IN_MEMORY` bytes stay where they are."""

    def __init__(self, z: Tensor, label: Tensor | None, settings: StageSettings, seed: int, device: str) -> None:
        self.device = torch.device(device)
        self.z = z.to(self.device) if z.nbytes <= IN_MEMORY else z
        self.label = label
        self.order = EpochSampler(len(z), settings.batch or 1, seed, "denoiser")

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        index = self.order[step]
        label = None if self.label is None else self.label[index]
        return Batch(self.z[index.to(self.z.device)].to(self.device), index, label)
