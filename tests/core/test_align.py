"""Crossing from one class to another: moments are carried over, and what corresponds is found."""

import math
import sys

import pytest
import torch
from torch import Tensor

from sfumato.core import Crossing, align, class_evidence, make_schedule, measure_spread, shortest
from sfumato.core.align import SHARES, _better, _errors

SIZE = 3


def items(seed: int, count: int = 4_000, size: int = SIZE) -> Tensor:
    """Points of a skewed distribution: none of its reflections is like it."""
    generator = torch.Generator().manual_seed(seed)
    z = -torch.log(torch.rand(count, size, generator=generator)) * torch.tensor([2.0, 1.0, 0.5])[:size]
    return z + torch.randn(count, size, generator=generator) * 0.1


def covariance(z: Tensor) -> Tensor:
    return torch.cov(z.double().T)


@pytest.mark.parametrize("power", [0.5, -0.5, 1.0])
def test_roots_of_what_was_measured(power: float):
    z = items(0)
    spread = measure_spread(z)
    root = spread.root(power)
    whole = root @ root if abs(power) == 0.5 else root
    wanted = covariance(z).inverse() if power < 0 else covariance(z)
    torch.testing.assert_close(whole, wanted, rtol=0.02, atol=0.02)
    noisy = spread.root(1.0, alpha=0.6, sigma=0.8)
    torch.testing.assert_close(noisy, 0.36 * covariance(z) + 0.64 * torch.eye(SIZE).double(), rtol=0.02, atol=0.02)


def test_few_items_are_drawn_towards_a_sphere():
    values = measure_spread(items(0, count=4, size=3)).values
    assert values.min() > 0.05 * values.max()  # three directions of four points: without it one would be near nothing


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.7, 0.3)])
def test_moments_are_carried_over_and_back(alpha: float, sigma: float):
    a, b = items(0), items(1) * 0.3 - 2
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)).double()).Q
    crossing = Crossing(measure_spread(a), measure_spread(b), turn)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    state = alpha * a + sigma * noise
    there = crossing(state, alpha, sigma)
    wanted = alpha**2 * covariance(b) + sigma**2 * torch.eye(SIZE).double()
    torch.testing.assert_close(covariance(there), wanted, rtol=0.1, atol=0.02)
    torch.testing.assert_close(there.mean(0), alpha * b.mean(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(crossing.back(there, alpha, sigma), state, rtol=1e-4, atol=1e-4)


def test_the_shortest_way_to_oneself_is_none():
    spread = measure_spread(items(0))
    z = items(5, count=50)
    torch.testing.assert_close(shortest(spread, spread)(z), z, rtol=1e-5, atol=1e-5)


def exact(z: Tensor, alpha: Tensor, sigma: Tensor, data: Tensor) -> Tensor:
    """E[z | z_t] for data (M, D) that are all there is."""
    square = torch.cdist(z, alpha[:, None, None] * data).squeeze(1).square()  # (B, M)
    return torch.softmax(-square / (2 * sigma[:, None] ** 2), 1) @ data


def test_a_mirror_image_is_found():
    """The target is the source's negative: moments and the shortest way know nothing of it, likelihood does."""
    source, target = items(0, count=600), -items(1, count=600)
    schedule = make_schedule("flow")

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.float() for value in schedule(t))
        return exact(z[:, None], alpha, sigma, target)

    start = shortest(measure_spread(source), measure_spread(target))
    done: list[int] = []
    found = align(denoise, schedule, start, source, 200, torch.Generator().manual_seed(0), done.append)
    z = items(7, count=200)
    far, near = ((way(z) + z).square().mean() for way in (start, found))
    assert near < 0.1 * far
    assert done == list(range(1, 201))
    torch.testing.assert_close(found.turn @ found.turn.T, torch.eye(SIZE).double(), rtol=0, atol=1e-9)


def test_a_turn_that_fits_a_few_items_by_chance_is_not_taken():
    """Source and target are the same: there is nothing to find, and what ten items suggest does not hold for others."""
    schedule = make_schedule("flow")

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.float() for value in schedule(t))
        return exact(z[:, None], alpha, sigma, items(1, count=600))

    z = items(0, count=10)
    start = shortest(measure_spread(items(0, count=600)), measure_spread(items(1, count=600)))
    found = align(denoise, schedule, start, z, 100, torch.Generator().manual_seed(0))
    assert torch.equal(found.turn, start.turn)


def test_an_item_that_is_drawn_again_is_no_further_evidence(monkeypatch: pytest.MonkeyPatch):
    """Of ten items, eight happen to gain: by as much as a coin could bring about."""
    gains = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, -2.5, -2.5], dtype=torch.float64)
    z = torch.arange(10.0)[:, None]
    of = lambda by: lambda denoise, schedule, z, generator: gains[z[:, 0].round().long()] if by(z) else 0 * z[:, 0]
    start, found = (lambda x: x + 0.2), (lambda x: x)
    monkeypatch.setattr(sys.modules["sfumato.core.align"], "_errors", of(lambda z: bool((z != z.round()).all())))
    better = lambda: _better(None, None, found, start, z, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert not better()
    gains += 1.5
    assert better()


def test_errors_are_of_the_noise_evenly_over_log_snr():
    """Of N(0, 1) a number is told by snr z / (1 + snr): the error of the noise is snr / (1 + snr), at each log-SNR."""
    schedule = make_schedule("flow")

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.float()[:, None] for value in schedule(t))
        return alpha * z / (alpha**2 + sigma**2)

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 2, generator=generator)
    low, high = (-2 * math.log(share / (1 - share)) for share in SHARES)
    even = torch.sigmoid(torch.linspace(low, high, 1_001)).mean()
    assert float(_errors(denoise, schedule, z, generator).mean()) == pytest.approx(2 * float(even), rel=0.01)


def test_evidence_of_a_class_is_the_gain_in_likelihood():
    """Over no class at first: it is largest where the class is. A rival that is as likely leaves none."""

    def gaussian(mean: float, variance: float):
        def denoise(z: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (value.float()[:, None] for value in schedule(t))
            return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)

        return denoise

    schedule = make_schedule("flow")
    z = torch.linspace(-2, 2, 5)[:, None].expand(5, SIZE).contiguous()
    under, null = gaussian(1.0, 0.1), gaussian(0.0, 1.1)
    seen = [class_evidence(under, [null], schedule, z, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    alone = class_evidence(under, [null], schedule, z[2:3], torch.Generator().manual_seed(0))
    torch.testing.assert_close(alone, seen[0][2:3])
    assert seen[0][3] > 0 > seen[0][1] > seen[0][0]  # at 1 the class is there, at -1 and -2 it is not
    assert seen[0].argmax() == 3
    rivals = [gaussian(-1.0, 0.1), gaussian(2.0, 0.1), null]
    least = class_evidence(under, rivals, schedule, z, torch.Generator().manual_seed(0))
    single = [class_evidence(under, [way], schedule, z, torch.Generator().manual_seed(0)) for way in rivals]
    torch.testing.assert_close(least, torch.stack(single).amin(0))
    assert least[3] > 0 > least[4]  # at 2 there is a rival, which the gain over no class does not see
    assert seen[0][4] > least[4]
