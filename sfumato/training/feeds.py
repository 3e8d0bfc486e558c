"""Where batches come from: which items a step gets depends on the seed, the stage and the step's number alone."""

import torch
from torch import Tensor

from sfumato.config import StageSettings
from sfumato.core import Trajectories, step_generator
from sfumato.data import Data
from sfumato.data.cache import IN_MEMORY
from sfumato.training.steps import Jumps
from sfumato.types import Batch

FROM_NOISE, STILL = 0.5, 0.1  # shares of states: pure noise, and those that are to stay where they are


class Order:
    """Epochs of permutations, each drawn from an address of its own.

    Args:
        count: Number of items.
        batch: Items a step.
        seed: Seed of the run.
        stage: Name of the stage.
    """

    def __init__(self, count: int, batch: int, seed: int, stage: str) -> None:
        self.count, self.batch, self.seed, self.stage = count, batch, seed, stage
        self.epochs: dict[int, Tensor] = {}

    def __getitem__(self, step: int) -> Tensor:
        """The items of a step, (batch,)."""
        first, last = step * self.batch, (step + 1) * self.batch - 1
        wanted = range(first // self.count, last // self.count + 1)
        self.epochs = {epoch: self.epochs[epoch] if epoch in self.epochs else self._draw(epoch) for epoch in wanted}
        # of each epoch the part that the step takes: joining whole epochs would cost as much as there is data
        parts = ((max(first - k * self.count, 0), last - k * self.count + 1) for k in wanted)
        return torch.cat([self.epochs[k][a:b] for k, (a, b) in zip(wanted, parts, strict=True)])

    def _draw(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=step_generator(self.seed, f"{self.stage}/order", epoch))


class DataFeed:
    """Batches of data, read as they are needed."""

    def __init__(self, data: Data, settings: StageSettings, seed: int, stage: str, device: str) -> None:
        self.data, self.device = data, torch.device(device)
        self.order = Order(len(data), settings.batch or 1, seed, stage)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        batch = self.data.batch(self.order[step])
        batch.data = batch.data.to(self.device)
        return batch


class LatentFeed:
    """Batches of latents (N, *latent_shape) and labels (N,); more than a device may hold stay where they are."""

    def __init__(self, z: Tensor, label: Tensor | None, settings: StageSettings, seed: int, device: str) -> None:
        self.device = torch.device(device)
        self.z = z.to(self.device) if z.nbytes <= IN_MEMORY else z
        self.label = label
        self.order = Order(len(z), settings.batch or 1, seed, "denoiser")

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        index = self.order[step]
        label = None if self.label is None else self.label[index]
        return Batch(self.z[index.to(self.z.device)].to(self.device), index, label)


class JumpFeed:
    """Batches of states of a teacher's trajectories.

    Half of them are the noise, where every item begins, the others from all over. Most lead to their ends; a few are
    still, so that the denoiser is not forgotten.

    Args:
        flights: The trajectories.
        label: Class numbers (N,) that they were made under, or None.
        batch: States a step.
        seed: Seed of which are taken.
        device: Where they are wanted.
    """

    def __init__(self, flights: Trajectories, label: Tensor | None, batch: int, seed: int, device: str) -> None:
        self.flights, self.label = flights, label
        self.size, self.seed, self.device = batch, seed, device

    def batch(self, step: int) -> Jumps:
        """The batch of a step."""
        generator = step_generator(self.seed, "distill/jumps", step)
        item = torch.randint(len(self.flights), (self.size,), generator=generator)
        chance, where, still = torch.rand(3, self.size, generator=generator)
        knot = torch.where(chance < FROM_NOISE, 0, (where * self.flights.knots).long())
        z, t, s, target = self.flights.at(item, knot, still < STILL)
        label = None if self.label is None else self.label[item]
        return Jumps(data=z.to(self.device), index=item, label=label, t=t, s=s, target=target.to(self.device))
