"""Training batches: the items of a step depend only on the seed, the stage and the step's number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.config import StageSettings
from sfumato.core import step_generator
from sfumato.data.cache import IN_MEMORY
from sfumato.data.dataset import Dataset
from sfumato.types import Batch, Latent, Raw


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
    """Batches of data, read when needed.

    Args:
        data: The data set.
        settings: Settings of the stage.
        seed: Seed of the run.
        stage: Name of the stage.
        device: Device of the batches.
        names: Conditions that batches have.
    """

    def __init__(
        self, data: Dataset, settings: StageSettings, seed: int, stage: str, device: str, names: Sequence[str] = ()
    ) -> None:
        self.data, self.device, self.names = data, torch.device(device), names
        self.order = EpochSampler(len(data), settings.batch or 1, seed, stage)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        batch = self.data.batch(self.order[step])
        mask = None if batch.mask is None else batch.mask.to(self.device)
        return Batch(batch.data.to(self.device), batch.index, batch.raw.only(self.names), mask)


@dataclass
class StoredLatents:
    """Latents of all items; of tokens only those that items have, one item after another.

    Args:
        z: (N, *latent_shape), or the tokens of all items (tokens, D).
        mask: (N, capacity), the tokens of each item; None for latents that are not tokens.
        segmented: Whether tokens have fixed positions, so that batches are not cut to their longest item.
    """

    z: Tensor
    mask: Tensor | None = None
    segmented: bool = False

    def __post_init__(self) -> None:
        self.ends = None if self.mask is None else self.mask.sum(1).cumsum(0)

    def __len__(self) -> int:
        return len(self.z if self.mask is None else self.mask)

    def select(self, index: Tensor) -> Latent:
        """The latents of the items `index` (B,)."""
        index = index.to(self.z.device)
        if self.mask is None or self.ends is None:
            return Latent(self.z[index])
        mask = self.mask[index]
        lengths = mask.sum(1)
        mask = mask if self.segmented else mask[:, : int(lengths.max())]
        first = (self.ends[index] - lengths).repeat_interleave(lengths)
        within = torch.arange(len(first)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        z = self.z.new_zeros(*mask.shape, self.z.shape[1])
        z[mask] = self.z[first + within]
        return Latent(z, mask)


class LatentBatches:
    """Batches of latents and conditions; latents above `IN_MEMORY` bytes stay where they are.

    Args:
        latents: Latents of N items.
        raw: Their conditions.
        settings: Settings of the stage.
        seed: Seed of the run.
        device: Device of the batches.
    """

    def __init__(self, latents: StoredLatents, raw: Raw, settings: StageSettings, seed: int, device: str) -> None:
        self.device = torch.device(device)
        if latents.mask is None and latents.z.nbytes <= IN_MEMORY:
            latents = StoredLatents(latents.z.to(self.device))
        self.latents, self.raw = latents, raw
        self.order = EpochSampler(len(latents), settings.batch or 1, seed, "denoiser")

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        index = self.order[step]
        latent = self.latents.select(index).to(self.device)
        return Batch(latent.z, index, self.raw.select(index), latent.mask)
