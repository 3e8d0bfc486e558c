"""Where batches come from: which items a step gets depends on the seed, the stage and the step's number alone."""

import torch
from torch import Tensor

from sfumato.config import StageSettings
from sfumato.core import Schedule, Trajectories, step_generator
from sfumato.data import Data
from sfumato.data.cache import IN_MEMORY
from sfumato.training.steps import Legs
from sfumato.types import Batch

FROM_NOISE, TO_DATA, DIAGONAL = 0.3, 0.5, 0.15  # shares of the parts of trajectories that begin or end there


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


class LegFeed:
    """Batches of parts of a teacher's trajectories.

    Of all parts `DIAGONAL` have no length: there the flow map is the denoiser itself. Of the others some begin at the
    noise and half end at the data, since that is what the fewest steps need.

    Args:
        flights: The trajectories.
        label: Class numbers (N,) that they were made under, or None.
        schedule: The path.
        batch: Parts a step.
        seed: Seed of which are taken.
        device: Where they are wanted.
    """

    def __init__(
        self, flights: Trajectories, label: Tensor | None, schedule: Schedule, batch: int, seed: int, device: str
    ) -> None:
        self.flights, self.label, self.schedule = flights, label, schedule
        self.size, self.seed, self.device = batch, seed, device

    def batch(self, step: int) -> Legs:
        """The batch of a step."""
        generator = step_generator(self.seed, "distill/legs", step)
        item = torch.randint(len(self.flights), (self.size,), generator=generator)
        z, t, s, target = self.flights.leg(self.schedule, item, *self.ends(generator))
        label = None if self.label is None else self.label[item]
        return Legs(data=z.to(self.device), index=item, label=label, t=t, s=s, target=target.to(self.device))

    def ends(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The numbers of the times at which each part begins and ends (B,)."""
        chance, first, last = torch.rand(3, self.size, generator=generator)
        knots = self.flights.knots
        i = torch.where(chance < FROM_NOISE, 0, (first * knots).long())
        some = i + 1 + (last * (knots - i)).long()
        chance = torch.rand(2, self.size, generator=generator)
        j = torch.where(chance[0] < TO_DATA, knots, some)
        return i, torch.where(chance[1] < DIAGONAL, i, j)
