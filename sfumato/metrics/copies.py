"""Which made items are copies: of real ones, or of one another."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sfumato.metrics.distances import closest, neighbours

CHECKED = 2_000  # real items whose neighbours say what near is
SHARE = 0.01  # of the real items that have a nearer neighbour than what counts as near

Stream = Callable[[], Iterable[Tensor]]


def usual_distance(some: Tensor, real: Iterable[Tensor], share: float = SHARE) -> float:
    """What a share of real points is nearer than to the nearest other one; 0 where so many are doubles.

    Args:
        some: Points (N, D), all of them among the real ones.
        real: All real points (M, D), in pieces.
        share: The quantile.
    """
    best = torch.full((len(some), 2), torch.inf, dtype=some.dtype)  # the nearest is each point itself
    for part in real:
        best = torch.cat([best, closest(some, part, 2)], 1).topk(2, dim=1, largest=False).values
    others = best[:, 1]
    others = others[others.isfinite()]
    return float(torch.quantile(others.double(), share)) if len(others) else 0.0


class Copies:
    """Tells made points that are nearer to a real one, or to another made one, than real ones are to one another.

    Args:
        real: Gives all real points (M, D), in pieces.
        some: Some of them (K, D), that say what near is.

    Attributes:
        near: The distance below which a point is a copy.
    """

    def __init__(self, real: Stream, some: Tensor) -> None:
        self.real, self.near = real, usual_distance(some, real())
        self.kept = some[:0]

    def of_real(self, points: Tensor) -> Tensor:
        """Which points (N, D) are copies of real ones (N,)."""
        found = torch.zeros(len(points), dtype=torch.bool)
        for part in self.real():
            found |= neighbours(points, part)[0] < self.near
        return found

    def of_made(self, points: Tensor) -> Tensor:
        """Which points (N, D) are copies of ones before them or kept earlier (N,); the others are kept."""
        found = torch.zeros(len(points), dtype=torch.bool)
        if len(self.kept) and len(points):
            found |= neighbours(points, self.kept)[0] < self.near
        twins = (torch.cdist(points, points) < self.near).tril(-1)  # (N, N): each with those before it
        for i in twins.any(1).nonzero().flatten():
            found[i] |= bool((twins[i] & ~found).any())
        self.kept = torch.cat([self.kept, points[~found]])
        return found
