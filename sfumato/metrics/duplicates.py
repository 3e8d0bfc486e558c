"""Near-duplicates among generated items: of real items, and of each other."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sfumato.metrics.distances import k_nearest_distances, nearest_neighbours

DISTANCE_SAMPLE = 2_000  # real items whose nearest-neighbour distances set the threshold
DUPLICATE_QUANTILE = 0.01  # share of real items whose nearest neighbour is closer than the threshold

Stream = Callable[[], Iterable[Tensor]]


def duplicate_threshold(sample: Tensor, real: Iterable[Tensor], quantile: float = DUPLICATE_QUANTILE) -> float:
    """Quantile of the distance of real points to their nearest neighbour; 0 if that many are exact duplicates.

    Args:
        sample: Some of the real points (N, D).
        real: All real points (M, D), in parts.
        quantile: The quantile.
    """
    best = torch.full((len(sample), 2), torch.inf, dtype=sample.dtype)  # the nearest point is the point itself
    for part in real:
        best = torch.cat([best, k_nearest_distances(sample, part, 2)], 1).topk(2, dim=1, largest=False).values
    distance = best[:, 1]
    distance = distance[distance.isfinite()]
    return float(torch.quantile(distance.double(), quantile)) if len(distance) else 0.0


class NearDuplicates:
    """Finds generated points that are closer to a real or generated one than real points are to each other.

    Args:
        real: Returns all real points (M, D), in parts.
        sample: Some of the real points (K, D), from which the threshold is measured.

    Attributes:
        threshold: Points closer than this distance are near-duplicates.
        accepted: Generated points so far that are no near-duplicates.
    """

    def __init__(self, real: Stream, sample: Tensor) -> None:
        self.real, self.threshold = real, duplicate_threshold(sample, real())
        self.accepted = sample[:0]

    def of_real(self, points: Tensor) -> Tensor:
        """Which points (N, D) are near-duplicates of real ones: bool (N,)."""
        found = torch.zeros(len(points), dtype=torch.bool)
        for part in self.real():
            found |= nearest_neighbours(points, part)[0] < self.threshold
        return found

    def filter_generated(self, points: Tensor) -> Tensor:
        """Which points (N, D) are near-duplicates of earlier generated ones: bool (N,); the rest is accepted."""
        found = torch.zeros(len(points), dtype=torch.bool)
        if len(self.accepted) and len(points):
            found |= nearest_neighbours(points, self.accepted)[0] < self.threshold
        close = (torch.cdist(points, points) < self.threshold).tril(-1)  # (N, N): to the points before
        for i in close.any(1).nonzero().flatten():
            found[i] |= bool((close[i] & ~found).any())
        self.accepted = torch.cat([self.accepted, points[~found]])
        return found
