"""Class labels, and none."""

import torch
from torch import Generator, Tensor, nn

from sfumato.choice import build
from sfumato.types import Cond


class Conditioner(nn.Module):
    """Raw conditions to `Cond`.

    `dim` is the length of `Cond.vector`, 0 where there is none; `classes` the number of labels it knows. An `UNKNOWN`
    label is the null condition.
    """

    dim: int = 0
    classes: int = 0

    def forward(self, label: Tensor | None, count: int) -> Cond:
        """The condition of `count` items; `label` (B,) are their class numbers, None means the null condition."""
        raise NotImplementedError

    def drop(self, label: Tensor | None, generator: Generator) -> Tensor | None:
        """Labels with some replaced by the null label, for training with guidance."""
        return label


class Unconditional(Conditioner):
    """No condition at all."""

    def forward(self, label: Tensor | None, count: int) -> Cond:
        return Cond()


class ClassLabels(Conditioner):
    """A learned vector per class, and one more for "no label" (the null condition of classifier-free guidance).

    Args:
        classes: Number of classes K; label K is the null label.
        dim: Length of the vectors.
        dropout: Share of training items whose label is hidden.

    References:
        Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598, algorithm 1.
    """

    def __init__(self, classes: int, dim: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.classes, self.dim, self.dropout = classes, dim, dropout
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, label: Tensor | None, count: int) -> Cond:
        if label is None:
            label = torch.full((count,), self.classes)
        label = torch.where(label < 0, self.classes, label)
        return Cond(vector=self.table(label.to(self.table.weight.device)))  # (B, dim)

    def drop(self, label: Tensor | None, generator: Generator) -> Tensor | None:
        assert label is not None, "a class-conditional model is trained on labels"
        hidden = torch.rand(len(label), generator=generator) < self.dropout
        return torch.where(hidden.to(label.device), self.classes, label)


CONDITIONERS: dict[str, type[Conditioner]] = {"none": Unconditional, "label": ClassLabels}


def make_conditioner(name: str, **settings: object) -> Conditioner:
    """A conditioner by name, with settings of its constructor."""
    return build(CONDITIONERS, "conditioner", name, settings)
