r"""Crossing over from one class of items to another, whose contents correspond though unpaired.

Two flows, of a source and of a target, meet in noise (DDIB). They need not mean the same by the same noise: any
rotation of it is as good as another, and between images and their negatives, say, the right one is -1. Here the
rotation is looked for. To first order both classes are Gaussian at every time, with means $\alpha m, \alpha m'$ and
covariances $C = \alpha^2 \Sigma + \sigma^2 I$ and $C'$. The linear maps that carry the one over into the other are

$z' = \alpha m' + (z - \alpha m) C^{-1/2} R C'^{1/2}$, with R orthogonal

(z is a row), and R is chosen so that what is carried over is most likely under the target's own denoiser. Between data
(t = 0) this is a linear map, between noises (t = 1) the rotation R, and between Gaussians the same map at all times.
"""

# pyright: reportUnknownMemberType=false

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from .denoiser import trail
from .sampler import Denoise
from .schedule import Schedule

TURNED = 128  # leading directions of the target that are turned
BATCH = 256  # items a step
RATE = 1e-2  # of Adam, in radians; falls to zero
SHARES = (0.1, 0.8)  # of noise, at which likelihood is compared
TRIAL = 0.25  # share of the steps that each start is given before the better one goes on
FRESH = 0.2  # share of the items that the search does not see, and must prove itself on
LOOKS = 8  # times and noises at which that is seen
_linalg: Any = torch.linalg  # its functions have no types
_FOLDED = 25  # steps after which the turn so far becomes the new zero: far from it the exponential bends


@dataclass(frozen=True)
class Spread:
    """Mean (d,) and covariance of a class, by eigenvalues (d,), rising, and eigenvectors (d, d) in columns.

    All in float64, on the CPU.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    def root(self, power: float, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        r"""$(\alpha^2 \Sigma + \sigma^2 I)^{power}$, (d, d)."""
        return (self.vectors * (alpha**2 * self.values + sigma**2) ** power) @ self.vectors.T


def measure_spread(z: Tensor) -> Spread:
    """Mean and covariance of items (N, ...), N of at least 2, drawn towards a sphere as far as N is small.

    References:
        Chen et al., Shrinkage Algorithms for MMSE Covariance Estimation, https://arxiv.org/abs/0907.4698 (eq. 23, OAS).
    """
    x = z.flatten(1).double().cpu()
    count, size = x.shape
    mean = x.mean(0)
    values: Tensor
    vectors: Tensor
    values, vectors = _linalg.eigh((x - mean).T @ (x - mean) / count)
    values = values.clamp_min(0)
    round_, square = values.mean(), values.square().sum()
    over = (1 - 2 / size) * square + (size * round_) ** 2
    under = (count + 1 - 2 / size) * (square - size * round_**2)
    share = 1.0 if under <= 0 else min(1.0, float(over / under))
    return Spread(mean, (torch.lerp(values, round_, share)).clamp_min(1e-8), vectors)


@dataclass(frozen=True)
class Crossing:
    """From a class's states at any time to another class's: moments carried over, with a rotation in between.

    Args:
        source: Moments of the class that is left.
        target: Moments of the class that is entered.
        turn: R (d, d), orthogonal.
    """

    source: Spread
    target: Spread
    turn: Tensor

    def __call__(self, z: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """States (B, ...) of the target at the time of (alpha, sigma), from states of the source at that time."""
        matrix = self.source.root(-0.5, alpha, sigma) @ self.turn @ self.target.root(0.5, alpha, sigma)
        x = z.flatten(1).double().cpu() - alpha * self.source.mean
        return (x @ matrix + alpha * self.target.mean).reshape(z.shape).to(z)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that it is made of, by name."""
        spreads = {"source": self.source, "target": self.target}
        parts = {f"{end}.{name}": part for end, spread in spreads.items() for name, part in vars(spread).items()}
        return {"turn": self.turn} | parts

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Crossing":
        """What `tensors` gave."""
        parts = ("mean", "values", "vectors")
        source, target = (Spread(*(tensors[f"{end}.{part}"] for part in parts)) for end in ("source", "target"))
        return cls(source, target, tensors["turn"])

    @property
    def back(self) -> "Crossing":
        """The way back, which is the exact inverse."""
        return Crossing(self.target, self.source, self.turn.T)


def shortest(source: Spread, target: Spread) -> Crossing:
    r"""The crossing that moves data least: optimal transport between the two Gaussians.

    Its turn is the orthogonal factor of $\Sigma^{1/2} \Sigma'^{1/2}$.

    References:
        Peyré and Cuturi, Computational Optimal Transport, https://arxiv.org/abs/1803.00567 (eq. 2.40).
    """
    u, _, v = _linalg.svd(source.root(0.5) @ target.root(0.5))
    return Crossing(source, target, u @ v)


def align(
    denoise: Denoise,
    schedule: Schedule,
    start: Crossing,
    z: Tensor,
    steps: int,
    generator: Generator,
    on_step: Callable[[int], None] | None = None,
) -> Crossing:
    r"""The crossing, turned so that what it makes of z is most likely under the target.

    Of z' = `start`(z) turned by R, entropy is the same for every R, so the likeliest is also the closest in
    distribution: KL = const - E log p(z'), and its bound by the denoiser's error,
    $\int E \|\hat z(z'_t) - z'\|^2 dSNR$, is descended. (Averaged over times without that weight, it is no bound, and
    finds wrong turns.) The start and its mirror image (-R) are both tried, and the better one goes on. What was found
    counts only if it beats the start by more than chance on items that the search has not seen: R has many angles, and
    few items can be fitted by a turn that means nothing.

    Args:
        denoise: (z, t) -> z_hat under the target's condition, of `BATCH` items.
        schedule: The path.
        start: Where to begin.
        z: Items of the source (N, ...).
        steps: Of gradient descent, in all.
        generator: Draws items and noise.
        on_step: Called with the number of steps done.

    References:
        Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630 (eq. 17): likelihood's bound.
    """
    trial = math.ceil(TRIAL * steps)
    kept = math.ceil(FRESH * len(z))
    seen, fresh = z[:-kept], z[-kept:]
    ways = [_Way(denoise, schedule, replace(start, turn=sign * start.turn), seen) for sign in (1, -1)]
    begun = generator.get_state()
    losses = list[float]()
    for number, way in enumerate(ways):
        generator.set_state(begun)  # the same items and noise for both
        taken = [way.step(generator, RATE) for _ in _told(trial, on_step, number * trial)]
        losses.append(sum(taken[len(taken) // 2 :]))
    best = ways[int(losses[1] < losses[0])]
    left = steps - 2 * trial
    for i in _told(left, on_step, 2 * trial):
        best.step(generator, RATE * (1 - i / left))
    return best.crossing if _better(denoise, schedule, best.crossing, start, fresh, generator) else start


@torch.no_grad()
def _better(
    denoise: Denoise, schedule: Schedule, found: Crossing, start: Crossing, z: Tensor, generator: Generator
) -> bool:
    """Whether what a crossing makes of items z is likelier than what another does, by two standard errors.

    An item may be drawn several times, and counts once.
    """
    gains, drawn = list[Tensor](), list[Tensor]()
    for _ in range(LOOKS):
        drawn.append(torch.randint(len(z), (BATCH,), generator=generator))
        x = z[drawn[-1]]
        begun, errors = generator.get_state(), list[Tensor]()
        for way in (start, found):
            generator.set_state(begun)  # the same noise for both
            errors.append(_errors(denoise, schedule, way(x), generator))
        gains.append(errors[0] - errors[1])
    which = torch.cat(drawn)
    counts = torch.bincount(which, minlength=len(z))
    gain = torch.bincount(which, torch.cat(gains).double().cpu(), len(z))[counts > 0] / counts[counts > 0]
    return len(gain) > 1 and bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))


def _errors(denoise: Denoise, schedule: Schedule, z: Tensor, generator: Generator) -> Tensor:
    r"""The squared error of the noise (B,) that the denoiser finds in items z (B, ...), at log-SNRs drawn evenly.

    That is the integral of $\|\hat z - z\|^2$ over the SNR, by which the bound of the likelihood is made.
    """
    share = torch.rand(len(z), generator=generator, dtype=torch.float64)
    return _missed(denoise, schedule, z, share, torch.randn(z.shape, generator=generator).to(z))


def _missed(denoise: Denoise, schedule: Schedule, z: Tensor, share: Tensor, noise: Tensor) -> Tensor:
    """The squared error of a given noise at a share (B,) of the way from the highest log-SNR to the lowest one."""
    low, high = (-2 * math.log(share / (1 - share)) for share in SHARES)
    logsnr = low + (high - low) * share
    t = schedule.inverse(logsnr)
    alpha, sigma = (trail(value, z) for value in schedule(t))
    missed = (denoise(alpha * z + sigma * noise, t) - z) * trail(torch.exp(logsnr / 2), z)
    return missed.square().flatten(1).sum(1)


@torch.no_grad()
def class_evidence(
    under: Denoise, rivals: Sequence[Denoise], schedule: Schedule, z: Tensor, generator: Generator
) -> Tensor:
    r"""How much more likely items z (B, ...) are under a class than under the likeliest of its rivals: (B,).

    The least, over rivals r, of $\frac{1}{2} \int (\|\hat\epsilon_r - \epsilon\|^2 - \|\hat\epsilon_c - \epsilon\|^2)
    d\lambda$ over the log-SNR, in nats: the difference of the bounds of $\log p(z | c)$ and $\log p(z | r)$. All items
    get the same noise, so that none hangs on what is beside it.

    Args:
        under: (z, t) -> z_hat under the class.
        rivals: The same under others.
        schedule: The path.
        z: Items.
        generator: Draws the noise.

    References:
        Li et al., Your Diffusion Model is Secretly a Zero-Shot Classifier, https://arxiv.org/abs/2303.16203 (eq. 5).
    """
    gains = list[Tensor]()
    for share in (torch.arange(LOOKS, dtype=torch.float64) + 0.5) / LOOKS:
        noise = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)
        mine, *theirs = (_missed(way, schedule, z, share.expand(len(z)), noise) for way in (under, *rivals))
        gains.append(torch.stack(theirs) - mine)
    low, high = (-2 * math.log(share / (1 - share)) for share in SHARES)
    return (low - high) / 2 * torch.stack(gains).mean(0).amin(0)


def _told(count: int, on_step: Callable[[int], None] | None, before: int) -> Iterator[int]:
    """The numbers up to count; after each, how many steps are done."""
    for i in range(count):
        yield i
        if on_step is not None:
            on_step(before + i + 1)


class _Way:
    """A crossing under descent: its turn is R (I + V (exp(W - W^T) - I) V^T), V the target's leading directions."""

    def __init__(self, denoise: Denoise, schedule: Schedule, start: Crossing, z: Tensor) -> None:
        self.denoise, self.schedule, self.start = denoise, schedule, start
        self.shape, self.device = z.shape[1:], z.device
        size = len(start.source.mean)
        self.led = start.target.vectors[:, -min(TURNED, size) :].float()  # (d, K)
        self.root, self.mean = start.target.root(0.5).float(), start.target.mean.float()
        white = (z.flatten(1).double().cpu() - start.source.mean) @ start.source.root(-0.5)
        self.items = (white @ start.turn).float()  # (N, d), as turned so far
        self.angles = torch.zeros(self.led.shape[1], self.led.shape[1], requires_grad=True)
        self.turned = torch.eye(size, dtype=torch.float64)
        self.optimizer = torch.optim.Adam([self.angles], betas=(0.9, 0.99))
        self.done = 0

    def _local(self) -> Tensor:
        """exp(W - W^T) - I, (K, K)."""
        turn = torch.matrix_exp(self.angles - self.angles.T)
        return turn - torch.eye(len(turn), dtype=turn.dtype)

    def step(self, generator: Generator, rate: float) -> float:
        """A step of descent; gives the error of the denoiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x = self.items[torch.randint(len(self.items), (BATCH,), generator=generator)]
        x = (x + x @ self.led @ self._local() @ self.led.T) @ self.root + self.mean
        z = x.reshape(-1, *self.shape).to(self.device)
        error = _errors(self.denoise, self.schedule, z, generator).mean()
        self.optimizer.zero_grad()
        error.backward()
        self.optimizer.step()
        self.done += 1
        if self.done % _FOLDED == 0:
            self._fold()
        return error.item()

    @torch.no_grad()
    def _fold(self) -> None:
        """Take the turn so far into the items, and begin anew at zero angles."""
        local = self._local()
        self.items = self.items + self.items @ self.led @ local @ self.led.T
        led = self.led.double()
        self.turned = self.turned + self.turned @ led @ local.double() @ led.T
        self.angles.zero_()

    @property
    def crossing(self) -> Crossing:
        """The crossing as turned so far."""
        self._fold()
        u, _, v = _linalg.svd(self.start.turn @ self.turned)  # rounding taken out of it
        return replace(self.start, turn=u @ v)
