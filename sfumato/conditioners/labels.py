"""Conditioners: class labels, and none."""

import torch
from torch import Generator, Tensor, nn

from sfumato.registry import build
from sfumato.types import Cond


class Conditioner(nn.Module):
    """Maps labels to `Cond`; the label `UNKNOWN` gives the null condition.

    Attributes:
        dim: Length of `Cond.vector`, 0 if there is none.
        classes: Number of class labels.
    """

    dim: int = 0
    classes: int = 0

    def forward(self, label: Tensor | None, count: int) -> Cond:
        """The condition of `count` items with class numbers `label` (B,); None gives the null condition."""
        raise NotImplementedError

    def dropout_labels(self, label: Tensor | None, generator: Generator) -> Tensor | None:
        """Labels with some replaced by the null label, to train for classifier-free guidance."""
        return label


class Unconditional(Conditioner):
    """No condition."""

    def forward(self, label: Tensor | None, count: int) -> Cond:
        return Cond()


class ClassLabels(Conditioner):
    """A learned embedding per class, and one for the null condition of classifier-free guidance.

    Args:
        classes: Number of classes K; label K is the null label.
        dim: Length of the embeddings.
        dropout: Fraction of training labels replaced by the null label.

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

    def dropout_labels(self, label: Tensor | None, generator: Generator) -> Tensor | None:
        assert label is not None, "a class-conditional model needs labels in training"
        dropped = torch.rand(len(label), generator=generator) < self.dropout
        return torch.where(dropped.to(label.device), self.classes, label)


CONDITIONERS: dict[str, type[Conditioner]] = {"none": Unconditional, "label": ClassLabels}


def make_conditioner(name: str, **settings: object) -> Conditioner:
    """Build a conditioner by its name in `CONDITIONERS` from the arguments of its constructor."""
    return build(CONDITIONERS, "conditioner", name, settings)
