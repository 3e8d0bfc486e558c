"""Distances between two sets of feature vectors (N, D), and between two sets of images, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**25  # elements of a distance matrix held at a time: 128 MiB in float32


@dataclass
class Moments:
    """Mean (D,) and unbiased covariance (D, D) in float64, and the number of vectors they were taken over."""

    mean: Tensor
    cov: Tensor
    count: int


def _stream(parts: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    if isinstance(parts, Tensor):
        yield parts
    else:
        yield from parts


def moments(parts: Tensor | Iterable[Tensor]) -> Moments:
    """Mean and covariance of feature vectors (N, D), or of a stream of such pieces, in one pass.

    Raises:
        ValueError: There are fewer than two vectors.
    """
    origin, total, outer, count = None, torch.zeros(()), torch.zeros(()), 0
    for part in _stream(parts):
        for rows in part.split(8192):
            x = rows.double()
            # sums are taken about the first rows' mean, so that a large mean does not eat the digits of the covariance
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
    r"""The Fréchet distance of two Gaussians fitted to two sets of features.

    $$ d^2 = |m_a - m_b|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}) $$

    The product is symmetric, so its eigenvalues are real and stable even where the covariances are singular.

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
    """The unbiased squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)^3; a and b of equal length m."""
    (m, dim), off = a.shape, a.shape[0] * (a.shape[0] - 1)
    k_aa, k_bb, k_ab = ((u @ v.T / dim + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    return (k_aa.sum() - k_aa.trace()) / off + (k_bb.sum() - k_bb.trace()) / off - 2 * k_ab.sum() / m**2


def kernel_distance(a: Tensor, b: Tensor, block: int = 1000, seed: int = 0) -> float:
    """The kernel inception distance: an unbiased squared MMD under a cubic kernel, averaged over disjoint blocks.

    Near zero for two samples of one distribution, and then as often below as above it.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        block: Vectors of each set a block; fewer when a set is smaller.
        seed: Seed of the order in which blocks are cut.

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
    """Rows of `a` (n, D) with their squared distances (n, M) to all of `b`, a bounded block at a time."""
    b_square = b.square().sum(1)
    for rows in a.split(max(1, BLOCK // max(1, len(b)))):
        square = torch.addmm(b_square, rows, b.T, alpha=-2)
        yield rows, square.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)


def neighbours(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance of each vector of `a` (N, D) to its nearest in `b` (M, D), exactly 0 for copies; and which it is: (N,).

    Without `b`, to the nearest of the others in `a`.
    """
    found: list[Tensor] = []
    which: list[Tensor] = []
    for rows, square in _blocks(a, a if b is None else b):
        if b is None:
            own = torch.arange(len(rows), device=a.device)
            square[own, own + sum(map(len, which))] = torch.inf
        which.append(square.argmin(1))
        # the neighbour is found by a matrix product, which rounds; its distance is then taken anew from the difference
        found.append((rows - (a if b is None else b)[which[-1]]).norm(dim=1))
    return torch.cat(found), torch.cat(which)


def closest(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Rising distances of each vector of `a` (N, D) to its k nearest in `b` (M, D): (N, min(k, M)), 0 for copies."""
    found: list[Tensor] = []
    for rows, square in _blocks(a, b):
        which = square.topk(min(k, len(b)), dim=1, largest=False).indices
        found.append((rows[:, None] - b[which]).norm(dim=2).sort(1).values)  # taken anew: the product rounds
    return torch.cat(found)


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """Distance of each vector of `a` (N, D) to its nearest in `b` (M, D): (N,), exactly 0 for copies."""
    return neighbours(a, b)[0]


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each vector of x (N, D) to the k-th nearest of the others: (N,)."""
    if len(x) < 2:
        raise ValueError(f"nearest neighbours: needs at least 2 vectors, got {len(x)}")
    k = min(k, len(x) - 1)
    return torch.cat([square.topk(k + 1, largest=False).values[:, -1] for _, square in _blocks(x, x)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Share of points (N, D) that lie in at least one ball."""
    return torch.cat([(square <= radii).any(1) for _, square in _blocks(points, centres)]).double().mean()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: fakes inside the union of the reals' k-neighbour balls, and the reverse.

    Args:
        real: Features (N, D).
        fake: Features (M, D), best of the same number.
        k: Which neighbour sets the radius of a ball.

    References:
        Kynkäänniemi et al. 2019, Improved Precision and Recall Metric, eq. 1-3, arXiv:1904.06991.
    """
    return float(_inside(fake, real, _radii(real, k))), float(_inside(real, fake, _radii(fake, k)))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density (mean number of real balls around a fake, over k) and coverage (share of real balls that hold a fake).

    Args:
        real: Features (N, D).
        fake: Features (M, D).
        k: Which neighbour sets the radius of a ball.

    References:
        Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, eq. 3-4, arXiv:2002.09797.
    """
    radii, held = _radii(real, k), 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, square in _blocks(fake, real):
        inside = square < radii
        held += int(inside.sum())
        covered |= inside.any(0)
    return held / (k * len(fake)), float(covered.double().mean())


def memorisation(generated: Tensor, train: Tensor | Iterable[Tensor], held: Tensor) -> dict[str, float]:
    """Are generated items closer to the training set than new real ones are?

    Args:
        generated: Items or features (N, D).
        train: All training items (M, D), or a stream of pieces of them.
        held: Held-out items (K, D): the floor.

    Returns:
        `novelty`: median distance to the nearest training item, relative to that of held-out items (1: as new as real
        ones, towards 0: copies). `copies`: share of generated items nearer than the nearest 1 % of held-out ones.
        Beside them their floors for new real items: 1, and the share of held-out items nearer than that.
    """
    far = torch.tensor(float("inf"), device=held.device)
    ours, theirs = far.expand(len(generated)), far.expand(len(held))
    for part in _stream(train):
        ours, theirs = torch.minimum(ours, nearest(generated, part)), torch.minimum(theirs, nearest(held, part))
    threshold = torch.quantile(theirs.double(), 0.01)
    floor = float(theirs.median())
    return {
        "novelty": float(ours.median()) / max(floor, 1e-12),
        "novelty_floor": 1.0,
        "copies": float((ours.double() <= threshold).double().mean()),
        "copies_floor": float((theirs.double() <= threshold).double().mean()),
    }


def psnr(x: Tensor, y: Tensor, span: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(span^2 / mse), mean over images (B, C, H, W), each at most 100 dB."""
    pairs = zip(x.split(500), y.split(500), strict=True)
    error = torch.cat([(u.double() - v.double()).square().flatten(1).mean(1) for u, v in pairs]) / span**2
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


def _gauss(x: Tensor, window: int, sigma: float = 1.5) -> Tensor:
    """Images (B, C, H, W) filtered by a separable Gaussian of `window` taps, without border: (B, C, H-w+1, W-w+1)."""
    taps = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    kernel = torch.exp(-taps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, window)
    return F.conv2d(F.conv2d(x, kernel, groups=x.shape[1]), kernel.mT, groups=x.shape[1])


def ssim(x: Tensor, y: Tensor, span: float = 2.0, window: int = 11) -> float:
    """Structural similarity under a Gaussian window of 11 taps (sigma 1.5), mean over pixels, channels, images.

    Args:
        x: Images (B, C, H, W).
        y: Images (B, C, H, W).
        span: Largest value minus smallest.
        window: Taps of the window; the largest odd number that fits smaller images.

    References:
        Wang et al. 2004, Image Quality Assessment, eq. 13.
    """
    side = min(x.shape[-2:])
    window = min(window, side - (side + 1) % 2)
    (c_1, c_2), scores = ((0.01 * span) ** 2, (0.03 * span) ** 2), []
    for u, v in zip(x.split(64), y.split(64), strict=True):
        u, v = u.double(), v.double()
        m_u, m_v, uu, vv, uv = (_gauss(w, window) for w in (u, v, u * u, v * v, u * v))
        structure = (2 * (uv - m_u * m_v) + c_2) / (uu - m_u**2 + vv - m_v**2 + c_2)
        scores.append((structure * (2 * m_u * m_v + c_1) / (m_u**2 + m_v**2 + c_1)).flatten(1).mean(1))
    return float(torch.cat(scores).mean())
