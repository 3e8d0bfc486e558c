"""What a linear crossing misses is learned from new items, carried there and back."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from sfumato.core import Crossing, bend, measure_spread, shortest


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller network, and fewer steps."""
    for name, value in {"STEPS": 400, "WIDTH": 128}.items():
        monkeypatch.setattr(import_module("sfumato.core.bend"), name, value)


def line(seed: int, count: int = 1_500) -> Tensor:
    """Points along a straight line (N, 2), which know where on it they are."""
    generator = torch.Generator().manual_seed(seed)
    u = 2 * torch.rand(count, 1, generator=generator) - 1
    return torch.cat([u, 0.02 * torch.randn(count, 1, generator=generator)], 1)


def bow(z: Tensor) -> Tensor:
    """The same points on a bow."""
    return torch.stack([z[:, 0], z[:, 1] + z[:, 0].square()], 1)


def nearest(items: Tensor):
    """Draws points to the nearest one of some items."""
    return lambda z: items[torch.cdist(z, items).argmin(1)]


@pytest.fixture(scope="module")
def crossing() -> Crossing:
    return shortest(measure_spread(line(0)), measure_spread(bow(line(1))))


def test_a_bow_is_learned_that_no_linear_map_makes(crossing: Crossing):
    a, b = line(0), bow(line(1))
    fits: list[int] = []
    found = bend(crossing, a, b, nearest(a), nearest(b), 2, 0, fits.append)
    fresh = line(2, 300)
    missed = [float((way(fresh) - bow(fresh)).square().mean()) for way in (crossing, found)]
    assert not any(part.requires_grad for part in found.parameters())
    assert fits == [1, 2, 3]
    assert missed[1] < missed[0] / 4


def test_a_share_of_the_steps_learns_less(crossing: Crossing):
    a, b = line(0), bow(line(1))
    fresh = line(2, 300)
    ways = (crossing, *(bend(crossing, a, b, nearest(a), nearest(b), 1, 0, share=share) for share in (0.25, 1.0)))
    missed = [float((way(fresh) - bow(fresh)).square().mean()) for way in ways]
    assert missed[2] < missed[1] < missed[0]


def test_nothing_is_added_where_nothing_is_missed_or_asked(crossing: Crossing):
    a, b = line(0), bow(line(1))
    for rounds in (0, 2):  # without drawing, the way there undoes the way back already
        found = bend(crossing, a, b, lambda z: z, lambda z: z, rounds, 0)
        assert found.added(a).abs().max() < 0.01
        torch.testing.assert_close(found(a), crossing(a), atol=0.01, rtol=0)


def test_the_seed_says_all_and_the_global_one_stays(crossing: Crossing):
    a, b = line(0, 200), bow(line(1, 200))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (bend(crossing, a, b, nearest(a), nearest(b), 1, seed)(a) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.rand(3), wanted)
