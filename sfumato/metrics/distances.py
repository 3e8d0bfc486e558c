"""Distances between two sets of feature vectors (N, D), in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**25  # elements of a distance matrix in memory at once: 128 MiB in float32


@dataclass
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of `count` vectors, in float64."""

    mean: Tensor
    cov: Tensor
    count: int


def _stream(parts: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    if isinstance(parts, Tensor):
        yield parts
    else:
        yield from parts


def moments(parts: Tensor | Iterable[Tensor]) -> Moments:
    """Mean and covariance of feature vectors (N, D), or of a stream of parts, in one pass.

    Raises:
        ValueError: There are fewer than two vectors.
    """
    origin, total, outer, count = None, torch.zeros(()), torch.zeros(()), 0
    for part in _stream(parts):
        for rows in part.split(8192):
            x = rows.double()
            # sums about the mean of the first rows: a large mean would cost the covariance its digits
            origin = x.mean(0) if origin is None else origin
            x = x - origin
            total, outer, count = total + x.sum(0), outer + x.T @ x, count + len(x)
    if origin is None or count < 2:
        raise ValueError(f"moments: needs at least 2 vectors, got {count}")
    mean = total / count
    return Moments(origin + mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count)


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(a: Tensor | Moments, b: Tensor | Moments) -> float:
    r"""Squared Fréchet distance between Gaussians fitted to two sets of features.

    $$ d^2 = |m_a - m_b|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}) $$

    The inner product is symmetric, so its eigenvalues are real and stable even for singular covariances.

    Args:
        a: Features (N, D) or their moments.
        b: Features (M, D) or their moments.

    References:
        Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, eq. 6, arXiv:1706.08500.
    """
    a, b = (v if isinstance(v, Moments) else moments(v) for v in (a, b))
    root = _root(a.cov)
    product = root @ b.cov @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    square = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(0.0, float(square))


def _mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)³ of a and b, both (m, D)."""
    (m, dim), off = a.shape, a.shape[0] * (a.shape[0] - 1)
    k_aa, k_bb, k_ab = ((u @ v.T / dim + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    return (k_aa.sum() - k_aa.trace()) / off + (k_bb.sum() - k_bb.trace()) / off - 2 * k_ab.sum() / m**2


def kernel_distance(a: Tensor, b: Tensor, block: int = 1000, seed: int = 0) -> float:
    """Kernel distance (KID): the unbiased squared MMD under a cubic kernel, averaged over disjoint blocks.

    For two samples of one distribution its mean is 0, so it is negative about half of the time.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        block: Vectors of each set per block; fewer if a set is smaller.
        seed: Seed of the assignment of vectors to blocks.

    Raises:
        ValueError: A set has fewer than two vectors.

    References:
        Bińkowski et al. 2018, Demystifying MMD GANs, section 4, arXiv:1801.01401.
    """
    count = min(len(a), len(b))
    if count < 2:
        raise ValueError(f"kernel_distance: needs at least 2 vectors in each set, got {len(a)} and {len(b)}")
    size = min(block, count)
    generator = torch.Generator().manual_seed(seed)
    a, b = (v[torch.randperm(len(v), generator=generator)[: count // size * size]] for v in (a, b))
    pairs = zip(a.double().split(size), b.double().split(size), strict=True)
    return float(torch.stack([_mmd(u, v) for u, v in pairs]).mean())


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `a` (n, D) and their squared distances (n, M) to all of `b` (M, D), in bounded blocks."""
    b_square = b.square().sum(1)
    for rows in a.split(max(1, BLOCK_ELEMENTS // max(1, len(b)))):
        square = torch.addmm(b_square, rows, b.T, alpha=-2)
        yield rows, square.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)


def nearest_neighbours(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance (N,) and index (N,) of the nearest neighbour in `b` (M, D) of each vector of `a` (N, D).

    The distance of equal vectors is exactly 0. Without `b`, neighbours are the other vectors of `a`.
    """
    distances: list[Tensor] = []
    indices: list[Tensor] = []
    for rows, square in _blocks(a, a if b is None else b):
        if b is None:
            own = torch.arange(len(rows), device=a.device)
            square[own, own + sum(map(len, indices))] = torch.inf
        indices.append(square.argmin(1))
        # the matrix product rounds, so the distance is computed again from the difference
        distances.append((rows - (a if b is None else b)[indices[-1]]).norm(dim=1))
    return torch.cat(distances), torch.cat(indices)


def k_nearest_distances(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Distances (N, min(k, M)), ascending, of each vector of `a` (N, D) to its k nearest in `b` (M, D)."""
    distances: list[Tensor] = []
    for rows, square in _blocks(a, b):
        indices = square.topk(min(k, len(b)), dim=1, largest=False).indices
        distances.append((rows[:, None] - b[indices]).norm(dim=2).sort(1).values)  # exact, as in nearest_neighbours
    return torch.cat(distances)


def nearest_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distance (N,) of each vector of `a` (N, D) to its nearest in `b` (M, D); exactly 0 for equal vectors."""
    return nearest_neighbours(a, b)[0]


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each vector of x (N, D) to the k-th nearest of the others."""
    if len(x) < 2:
        raise ValueError(f"nearest neighbours: needs at least 2 vectors, got {len(x)}")
    k = min(k, len(x) - 1)
    return torch.cat([square.topk(k + 1, largest=False).values[:, -1] for _, square in _blocks(x, x)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Share of points (N, D) inside at least one ball of these centres (M, D) and squared radii (M,)."""
    return torch.cat([(square <= radii).any(1) for _, square in _blocks(points, centres)]).double().mean()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: the share of fakes inside the union of the reals' k-NN balls, and the reverse.

    Args:
        real: Features (N, D).
        fake: Features (M, D), preferably with M = N.
        k: A ball reaches to the k-th nearest neighbour.

    References:
        Kynkäänniemi et al. 2019, Improved Precision and Recall Metric, eq. 1-3, arXiv:1904.06991.
    """
    return float(_inside(fake, real, _squared_radii(real, k))), float(_inside(real, fake, _squared_radii(fake, k)))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density (mean number of real balls around a fake, over k) and coverage (share of real balls with a fake inside).

    Args:
        real: Features (N, D).
        fake: Features (M, D).
        k: A ball reaches to the k-th nearest neighbour.

    References:
        Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, eq. 3-4, arXiv:2002.09797.
    """
    radii, pairs = _squared_radii(real, k), 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, square in _blocks(fake, real):
        inside = square < radii
        pairs += int(inside.sum())
        covered |= inside.any(0)
    return pairs / (k * len(fake)), float(covered.double().mean())


def memorisation(generated: Tensor, train: Tensor | Iterable[Tensor], held: Tensor) -> dict[str, float]:
    """Whether generated items are closer to the training set than held-out real items are.

    Args:
        generated: Items or features (N, D).
        train: All training items (M, D), or a stream of parts of them.
        held: Held-out items (K, D).

    Returns:
        `novelty`: median distance to the nearest training item, relative to that of held-out items (1: as new as real
        items, towards 0: copies). `copies`: share of generated items whose distance is below the 1 % quantile of
        held-out items. `novelty_floor` and `copies_floor`: the same of held-out items.
    """
    infinity = torch.tensor(float("inf"), device=held.device)
    distance, held_distance = infinity.expand(len(generated)), infinity.expand(len(held))
    for part in _stream(train):
        distance = torch.minimum(distance, nearest_distances(generated, part))
        held_distance = torch.minimum(held_distance, nearest_distances(held, part))
    threshold = torch.quantile(held_distance.double(), 0.01)
    floor = float(held_distance.median())
    return {
        "novelty": float(distance.median()) / max(floor, 1e-12),
        "novelty_floor": 1.0,
        "copies": float((distance.double() <= threshold).double().mean()),
        "copies_floor": float((held_distance.double() <= threshold).double().mean()),
    }
