"""Conditions of some training items, to complete those that a request leaves open."""

import torch
from torch import Tensor, nn

from sfumato.types import UNKNOWN, Raw

OBSERVED_ITEMS = 1024  # training items whose conditions are kept


class ObservedConditions(nn.Module):
    """The labels and numbers of some training items, stored with the weights; row k of all belongs to one item.

    Args:
        labels: Names of the label conditions.
        numbers: Names of the number conditions.
    """

    def __init__(self, labels: list[str], numbers: list[str]) -> None:
        super().__init__()
        self.label_names, self.number_names = labels, numbers
        self.register_buffer("labels", torch.full((OBSERVED_ITEMS, len(labels)), UNKNOWN))
        self.register_buffer("numbers", torch.full((OBSERVED_ITEMS, len(numbers)), torch.nan))

    labels: Tensor
    numbers: Tensor

    @torch.no_grad()
    def learn(self, raw: Raw, count: int) -> None:
        """Keep the conditions of some of `count` training items."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        rows = order[torch.arange(OBSERVED_ITEMS) % count]
        for buffer, names in ((self.labels, self.label_names), (self.numbers, self.number_names)):
            for column, name in enumerate(names):
                values = raw.values[name]
                assert isinstance(values, Tensor)
                buffer[:, column] = values[rows].to(buffer)

    def complete(self, known: Raw, draw: Tensor) -> Raw:
        """The known conditions of new items and, for the others, those of training items that have the same labels.

        Args:
            known: Conditions of B items.
            draw: A random number in [0, 1) for each item (B,), which selects its training item.
        """
        labels, numbers = self.labels.cpu(), self.numbers.cpu()
        match = torch.ones(len(draw), len(labels), dtype=torch.bool)
        for column, name in zip(labels.T, self.label_names, strict=True):
            values = known.values.get(name)
            if isinstance(values, Tensor):
                match &= column == values.cpu()[:, None]
        match |= ~match.any(1, keepdim=True)  # no training item has these labels: any one will do
        position = (draw * match.sum(1)).long()
        row = (match.cumsum(1) > position[:, None]).int().argmax(1)  # the match at that position
        drawn = dict(zip(self.label_names, labels[row].T, strict=True))
        drawn |= dict(zip(self.number_names, numbers[row].T, strict=True))
        return Raw({**drawn, **known.values})
