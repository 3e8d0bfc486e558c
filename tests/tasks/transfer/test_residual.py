"""The residual of a Gaussian map is learned by back-translation."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from sfumato.tasks.transfer.gaussian_map import GaussianMap, fit_gaussian, optimal_transport
from sfumato.tasks.transfer.residual import fit_residual


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller network, and fewer steps."""
    for name, value in {"RESIDUAL_STEPS": 400, "RESIDUAL_WIDTH": 128}.items():
        monkeypatch.setattr(import_module("sfumato.tasks.transfer.residual"), name, value)


def line(seed: int, count: int = 1_500) -> Tensor:
    """Points on a straight line (N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    u = 2 * torch.rand(count, 1, generator=generator) - 1
    return torch.cat([u, 0.02 * torch.randn(count, 1, generator=generator)], 1)


def parabola(z: Tensor) -> Tensor:
    """The same points on a parabola."""
    return torch.stack([z[:, 0], z[:, 1] + z[:, 0].square()], 1)


def nearest(items: Tensor):
    """Moves points to their nearest item."""
    return lambda z: items[torch.cdist(z, items).argmin(1)]


@pytest.fixture(scope="module")
def gaussian_map() -> GaussianMap:
    return optimal_transport(fit_gaussian(line(0)), fit_gaussian(parabola(line(1))))


def test_a_nonlinear_map_is_learned(gaussian_map: GaussianMap):
    a, b = line(0), parabola(line(1))
    fits: list[int] = []
    found = fit_residual(gaussian_map, a, b, nearest(a), nearest(b), 2, 0, fits.append)
    fresh = line(2, 300)
    error = [float((map_(fresh) - parabola(fresh)).square().mean()) for map_ in (gaussian_map, found)]
    assert not any(part.requires_grad for part in found.parameters())
    assert fits == [1, 2, 3]
    assert error[1] < error[0] / 4


def test_a_share_of_the_steps_learns_less(gaussian_map: GaussianMap):
    a, b = line(0), parabola(line(1))
    fresh = line(2, 300)
    maps = (
        gaussian_map,
        *(fit_residual(gaussian_map, a, b, nearest(a), nearest(b), 1, 0, share=share) for share in (0.25, 1.0)),
    )
    error = [float((map_(fresh) - parabola(fresh)).square().mean()) for map_ in maps]
    assert error[2] < error[1] < error[0]


def test_the_residual_is_zero_without_rounds_or_refinement(gaussian_map: GaussianMap):
    a, b = line(0), parabola(line(1))
    for rounds in (0, 2):  # without refinement, both maps are inverse already
        found = fit_residual(gaussian_map, a, b, lambda z: z, lambda z: z, rounds, 0)
        assert found.residual(a).abs().max() < 0.01
        torch.testing.assert_close(found(a), gaussian_map(a), atol=0.01, rtol=0)


def test_the_seed_determines_the_result_and_the_global_state_is_kept(gaussian_map: GaussianMap):
    a, b = line(0, 200), parabola(line(1, 200))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (fit_residual(gaussian_map, a, b, nearest(a), nearest(b), 1, seed)(a) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)
