"""Gaussian maps: moments are matched, and the rotation between unpaired classes is found."""

import math
import sys

import pytest
import torch
from torch import Tensor

from sfumato.core import NoiseLevel, make_schedule
from sfumato.core.likelihood import NOISE_FRACTIONS
from sfumato.tasks.transfer.gaussian_map import (
    GaussianMap,
    _errors,
    _is_better,
    fit_gaussian,
    optimal_transport,
    search_rotation,
)

SIZE = 3


def items(seed: int, count: int = 4_000, size: int = SIZE) -> Tensor:
    """Points of a skewed distribution, which differs from all its reflections."""
    generator = torch.Generator().manual_seed(seed)
    z = -torch.log(torch.rand(count, size, generator=generator)) * torch.tensor([2.0, 1.0, 0.5])[:size]
    return z + torch.randn(count, size, generator=generator) * 0.1


def covariance(z: Tensor) -> Tensor:
    return torch.cov(z.double().T)


@pytest.mark.parametrize("power", [0.5, -0.5, 1.0])
def test_powers_of_the_covariance(power: float):
    z = items(0)
    gaussian = fit_gaussian(z)
    root = gaussian.covariance_power(power)
    result = root @ root if abs(power) == 0.5 else root
    expected = covariance(z).inverse() if power < 0 else covariance(z)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    noisy = gaussian.covariance_power(1.0, alpha=0.6, sigma=0.8)
    torch.testing.assert_close(noisy, 0.36 * covariance(z) + 0.64 * torch.eye(SIZE).double(), rtol=0.02, atol=0.02)


def test_the_covariance_of_few_items_is_shrunk():
    values = fit_gaussian(items(0, count=4, size=3)).values
    assert values.min() > 0.05 * values.max()  # four points in three dimensions: one eigenvalue would nearly vanish


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.7, 0.3)])
def test_moments_are_matched_in_both_directions(alpha: float, sigma: float):
    a, b = items(0), items(1) * 0.3 - 2
    rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)).double()).Q
    gaussian_map = GaussianMap(fit_gaussian(a), fit_gaussian(b), rotation)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    z_t = alpha * a + sigma * noise
    mapped = gaussian_map(z_t, alpha, sigma)
    expected = alpha**2 * covariance(b) + sigma**2 * torch.eye(SIZE).double()
    torch.testing.assert_close(covariance(mapped), expected, rtol=0.1, atol=0.02)
    torch.testing.assert_close(mapped.mean(0), alpha * b.mean(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(gaussian_map.inverse(mapped, alpha, sigma), z_t, rtol=1e-4, atol=1e-4)


def test_optimal_transport_to_the_same_class_is_the_identity():
    gaussian = fit_gaussian(items(0))
    z = items(5, count=50)
    torch.testing.assert_close(optimal_transport(gaussian, gaussian)(z), z, rtol=1e-5, atol=1e-5)


def exact(z: Tensor, level: NoiseLevel, data: Tensor) -> Tensor:
    """E[z | z_t] for a distribution of the points `data` (M, D)."""
    alpha, sigma = level.alpha.float(), level.sigma.float()
    square = torch.cdist(z[:, None], alpha[:, None, None] * data).squeeze(1).square()  # (B, M)
    return torch.softmax(-square / (2 * sigma[:, None] ** 2), 1) @ data


def test_a_mirror_image_is_found():
    """The target is the source's negative, which the likelihood shows and the moments do not."""
    source, target = items(0, count=600), -items(1, count=600)
    schedule = make_schedule("flow")

    def denoise(z: Tensor, level: NoiseLevel) -> Tensor:
        return exact(z, level, target)

    start = optimal_transport(fit_gaussian(source), fit_gaussian(target))
    done: list[int] = []
    found = search_rotation(denoise, schedule, start, source, 200, torch.Generator().manual_seed(0), done.append)
    z = items(7, count=200)
    far, near = ((gaussian_map(z) + z).square().mean() for gaussian_map in (start, found))
    assert near < 0.1 * far
    assert done == list(range(1, 201))
    torch.testing.assert_close(found.rotation @ found.rotation.T, torch.eye(SIZE).double(), rtol=0, atol=1e-9)


def test_a_rotation_that_overfits_few_items_is_rejected():
    """Source and target are the same: what ten items suggest does not hold for others."""
    schedule = make_schedule("flow")

    def denoise(z: Tensor, level: NoiseLevel) -> Tensor:
        return exact(z, level, items(1, count=600))

    z = items(0, count=10)
    start = optimal_transport(fit_gaussian(items(0, count=600)), fit_gaussian(items(1, count=600)))
    found = search_rotation(denoise, schedule, start, z, 100, torch.Generator().manual_seed(0))
    assert torch.equal(found.rotation, start.rotation)


def test_repeated_draws_of_an_item_count_once(monkeypatch: pytest.MonkeyPatch):
    """Eight of ten items gain, which may be chance."""
    gains = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, -2.5, -2.5], dtype=torch.float64)
    z = torch.arange(10.0)[:, None]
    start, found = (lambda x: x + 0.2), (lambda x: x)

    def errors(denoise: object, schedule: object, z: Tensor, generator: object) -> Tensor:
        from_start = bool((z != z.round()).all())
        return gains[z[:, 0].round().long()] if from_start else 0 * z[:, 0]

    monkeypatch.setattr(sys.modules["sfumato.tasks.transfer.gaussian_map"], "_errors", errors)
    better = lambda: _is_better(None, None, found, start, z, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert not better()
    gains += 1.5
    assert better()


def test_errors_in_the_noise_are_uniform_over_log_snr():
    """For N(0, 1), E[z | z_t] leaves an error of snr / (1 + snr) in the noise at each log-SNR."""
    schedule = make_schedule("flow")

    def denoise(z: Tensor, level: NoiseLevel) -> Tensor:
        alpha, sigma = level.alpha.float()[:, None], level.sigma.float()[:, None]
        return alpha * z / (alpha**2 + sigma**2)

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 2, generator=generator)
    high, low = (-2 * math.log(fraction / (1 - fraction)) for fraction in NOISE_FRACTIONS)
    expected = torch.sigmoid(torch.linspace(high, low, 1_001)).mean()
    assert float(_errors(denoise, schedule, z, generator).mean()) == pytest.approx(2 * float(expected), rel=0.01)
