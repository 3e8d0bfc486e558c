r"""A linear map between the latents of two unpaired classes: it matches moments; its rotation is searched.

Two flows, of a source and of a target class, meet in noise (DDIB), but the same noise need not mean the same content:
any rotation of it is equally valid, and between images and their negatives, say, the right one is -1. To first order
both classes are Gaussian at every time, with means $\alpha m, \alpha m'$ and covariances
$C = \alpha^2 \Sigma + \sigma^2 I$ and $C'$. The linear maps between them are

$z' = \alpha m' + (z - \alpha m) C^{-1/2} R C'^{1/2}$, with R orthogonal

(z is a row vector), and R is chosen so that mapped items are most likely under the target's denoiser. For data (t = 0)
this is a linear map, for noise (t = 1) the rotation R; for Gaussians it is the same map at all times.
"""

# pyright: reportUnknownMemberType=false
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from sfumato.core.denoiser import Denoise
from sfumato.core.likelihood import QUADRATURE_POINTS, noise_prediction_error
from sfumato.core.schedule import Schedule

ROTATED_DIRECTIONS = 128  # leading principal directions of the target that are rotated
ROTATION_BATCH = 256  # items per optimizer step
ROTATION_LR = 1e-2  # Adam learning rate in radians, decays to zero
ROTATION_TRIAL_SHARE = 0.25  # share of the steps for each of the two starts, before the better one goes on
ROTATION_VALIDATION_SHARE = 0.2  # share of the items that the search does not see and its result is validated on
FOLD_EVERY = 25  # steps after which the angles are folded into the rotation; the exponential is accurate near zero
_linalg: Any = torch.linalg  # its functions have no types


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance of a class, as increasing eigenvalues (d,) and eigenvectors (d, d) in columns.

    All in float64, on the CPU.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    def covariance_power(self, power: float, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        r"""$(\alpha^2 \Sigma + \sigma^2 I)^{power}$, (d, d)."""
        return (self.vectors * (alpha**2 * self.values + sigma**2) ** power) @ self.vectors.T


def fit_gaussian(z: Tensor) -> Gaussian:
    """Mean and shrunk covariance of items (N, ...), N >= 2: the fewer items, the more isotropic.

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
    average, square = values.mean(), values.square().sum()
    numerator = (1 - 2 / size) * square + (size * average) ** 2
    denominator = (count + 1 - 2 / size) * (square - size * average**2)
    shrinkage = 1.0 if denominator <= 0 else min(1.0, float(numerator / denominator))
    return Gaussian(mean, (torch.lerp(values, average, shrinkage)).clamp_min(1e-8), vectors)


@dataclass(frozen=True)
class GaussianMap:
    """Maps noisy latents of a source class to a target class by whitening, rotating and colouring.

    Args:
        source: Moments of the source class.
        target: Moments of the target class.
        rotation: R (d, d), orthogonal.
    """

    source: Gaussian
    target: Gaussian
    rotation: Tensor

    def __call__(self, z: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Latents (B, ...) of the target at noise level (alpha, sigma), from latents of the source at that level."""
        matrix = (
            self.source.covariance_power(-0.5, alpha, sigma)
            @ self.rotation
            @ self.target.covariance_power(0.5, alpha, sigma)
        )
        x = z.flatten(1).double().cpu() - alpha * self.source.mean
        return (x @ matrix + alpha * self.target.mean).reshape(z.shape).to(z)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        gaussians = {"source": self.source, "target": self.target}
        parts = {f"{end}.{name}": part for end, gaussian in gaussians.items() for name, part in vars(gaussian).items()}
        return {"rotation": self.rotation} | parts

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "GaussianMap":
        """The map that `tensors` describe."""
        parts = ("mean", "values", "vectors")
        source, target = (Gaussian(*(tensors[f"{end}.{part}"] for part in parts)) for end in ("source", "target"))
        return cls(source, target, tensors["rotation"])

    @property
    def inverse(self) -> "GaussianMap":
        """The exact inverse."""
        return GaussianMap(self.target, self.source, self.rotation.T)


def optimal_transport(source: Gaussian, target: Gaussian) -> GaussianMap:
    r"""The map that moves data least: optimal transport between the two Gaussians.

    Its rotation is the orthogonal factor of $\Sigma^{1/2} \Sigma'^{1/2}$.

    References:
        Peyré and Cuturi, Computational Optimal Transport, https://arxiv.org/abs/1803.00567 (eq. 2.40).
    """
    u, _, v = _linalg.svd(source.covariance_power(0.5) @ target.covariance_power(0.5))
    return GaussianMap(source, target, u @ v)


def search_rotation(
    denoise: Denoise,
    schedule: Schedule,
    start: GaussianMap,
    z: Tensor,
    steps: int,
    generator: Generator,
    on_step: Callable[[int], None] | None = None,
) -> GaussianMap:
    r"""Search for the rotation that makes mapped items most likely under the target.

    The entropy of z' = `start`(z), rotated by R, is the same for every R, so the most likely is also the closest in
    distribution: KL = const - E log p(z'). Gradient descent minimises the denoiser's bound of it,
    $\int E \|\hat z(z'_t) - z'\|^2 dSNR$ (averaged over times without that weight, it is no bound and finds wrong
    rotations). The start and its mirror image (-R) are both tried, and the better one goes on. The result is accepted
    only if it beats the start significantly on held-out items: R has many angles and can overfit few items.

    Args:
        denoise: (z, level) -> z_hat under the target's condition, for `ROTATION_BATCH` items.
        schedule: The noise schedule.
        start: Initial map.
        z: Items of the source (N, ...).
        steps: Optimizer steps in all.
        generator: Draws items and noise.
        on_step: Called with the number of completed steps.

    References:
        Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630 (eq. 17): the likelihood bound.
    """
    trial_steps = math.ceil(ROTATION_TRIAL_SHARE * steps)
    held_out = math.ceil(ROTATION_VALIDATION_SHARE * len(z))
    train, validation = z[:-held_out], z[-held_out:]
    searches = [
        _RotationSearch(denoise, schedule, replace(start, rotation=sign * start.rotation), train) for sign in (1, -1)
    ]
    random_state = generator.get_state()
    losses = list[float]()
    for number, search in enumerate(searches):
        generator.set_state(random_state)  # the same items and noise for both
        trial = [
            search.step(generator, ROTATION_LR) for _ in _counted_steps(trial_steps, on_step, number * trial_steps)
        ]
        losses.append(sum(trial[len(trial) // 2 :]))
    best = searches[int(losses[1] < losses[0])]
    remaining = steps - 2 * trial_steps
    for i in _counted_steps(remaining, on_step, 2 * trial_steps):
        best.step(generator, ROTATION_LR * (1 - i / remaining))
    return best.result if _is_better(denoise, schedule, best.result, start, validation, generator) else start


@torch.no_grad()
def _is_better(
    denoise: Denoise, schedule: Schedule, found: GaussianMap, start: GaussianMap, z: Tensor, generator: Generator
) -> bool:
    """Whether items mapped by `found` are more likely than those mapped by `start`, by two standard errors.

    An item may be drawn several times, and counts once.
    """
    gains, indices = list[Tensor](), list[Tensor]()
    for _ in range(QUADRATURE_POINTS):
        indices.append(torch.randint(len(z), (ROTATION_BATCH,), generator=generator))
        x = z[indices[-1]]
        random_state, errors = generator.get_state(), list[Tensor]()
        for gaussian_map in (start, found):
            generator.set_state(random_state)  # the same noise for both
            errors.append(_errors(denoise, schedule, gaussian_map(x), generator))
        gains.append(errors[0] - errors[1])
    index = torch.cat(indices)
    counts = torch.bincount(index, minlength=len(z))
    gain = torch.bincount(index, torch.cat(gains).double().cpu(), len(z))[counts > 0] / counts[counts > 0]
    return len(gain) > 1 and bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))


def _errors(denoise: Denoise, schedule: Schedule, z: Tensor, generator: Generator) -> Tensor:
    r"""The denoiser's squared error (B,) in the noise of items z (B, ...), at uniformly distributed log-SNRs.

    Its mean is the integral of $\|\hat z - z\|^2$ over the SNR, the likelihood bound.
    """
    u = torch.rand(len(z), generator=generator, dtype=torch.float64)
    return noise_prediction_error(denoise, schedule, z, u, torch.randn(z.shape, generator=generator).to(z))


def _counted_steps(count: int, on_step: Callable[[int], None] | None, before: int) -> Iterator[int]:
    """range(count), reporting the completed steps after each."""
    for i in range(count):
        yield i
        if on_step is not None:
            on_step(before + i + 1)


class _RotationSearch:
    """Descent on the rotation R (I + V (exp(W - W^T) - I) V^T), V the target's leading directions."""

    def __init__(self, denoise: Denoise, schedule: Schedule, start: GaussianMap, z: Tensor) -> None:
        self.denoise, self.schedule, self.start = denoise, schedule, start
        self.shape, self.device = z.shape[1:], z.device
        size = len(start.source.mean)
        self.directions = start.target.vectors[:, -min(ROTATED_DIRECTIONS, size) :].float()  # (d, K)
        self.root, self.mean = start.target.covariance_power(0.5).float(), start.target.mean.float()
        white = (z.flatten(1).double().cpu() - start.source.mean) @ start.source.covariance_power(-0.5)
        self.items = (white @ start.rotation).float()  # (N, d), whitened and rotated so far
        self.angles = torch.zeros(self.directions.shape[1], self.directions.shape[1], requires_grad=True)
        self.rotation = torch.eye(size, dtype=torch.float64)  # relative to the start
        self.optimizer = torch.optim.Adam([self.angles], betas=(0.9, 0.99))
        self.done = 0

    def _increment(self) -> Tensor:
        """exp(W - W^T) - I, (K, K)."""
        rotation = torch.matrix_exp(self.angles - self.angles.T)
        return rotation - torch.eye(len(rotation), dtype=rotation.dtype)

    def step(self, generator: Generator, lr: float) -> float:
        """One optimizer step; returns the denoiser's error."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = self.items[torch.randint(len(self.items), (ROTATION_BATCH,), generator=generator)]
        x = (x + x @ self.directions @ self._increment() @ self.directions.T) @ self.root + self.mean
        z = x.reshape(-1, *self.shape).to(self.device)
        error = _errors(self.denoise, self.schedule, z, generator).mean()
        self.optimizer.zero_grad()
        error.backward()
        self.optimizer.step()
        self.done += 1
        if self.done % FOLD_EVERY == 0:
            self._fold()
        return error.item()

    @torch.no_grad()
    def _fold(self) -> None:
        """Apply the angles to items and rotation, and reset them to zero."""
        increment = self._increment()
        self.items = self.items + self.items @ self.directions @ increment @ self.directions.T
        directions = self.directions.double()
        self.rotation = self.rotation + self.rotation @ directions @ increment.double() @ directions.T
        self.angles.zero_()

    @property
    def result(self) -> GaussianMap:
        """The map with the rotation found so far."""
        self._fold()
        u, _, v = _linalg.svd(self.start.rotation @ self.rotation)  # removes rounding errors
        return replace(self.start, rotation=u @ v)
