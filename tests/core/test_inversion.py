"""Inversion is the exact inverse of regeneration, lands on the true flow's noise, and does not mind the batch."""

import pytest
import torch

from sfumato.core import Denoiser, flow_grid, invert, make_schedule, regenerate, sample, slerp
from sfumato.core.inversion import Undo, fixed_point
from sfumato.core.sampler import SAMPLERS
from sfumato.nn import make_net
from tests.core.exact import TWO_MODES, order

BAR = 1e-3  # relative error of invert-and-regenerate at 50 steps


def relative(a, b):
    """Error of each item, the largest."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def data(shape):
    z = TWO_MODES.draw(int(torch.Size(shape).numel()), torch.Generator().manual_seed(0))
    return z.float().reshape(shape)


@pytest.fixture(scope="module")
def net():
    """A network with random weights, whose flow is as curved as one can ask for."""
    torch.manual_seed(0)
    net = make_net("mlp", latent_shape=(3, 2, 2), cond_dim=0, width=32, depth=2).requires_grad_(False)
    for weight in net.parameters():
        weight.add_(torch.randn(weight.shape), alpha=0.2)
    return Denoiser(net, make_schedule("flow"), "flow").eval()


@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm"])
def test_there_and_back_on_the_mixture(name):
    schedule, z = make_schedule(name), data((32, 4))
    denoise, grid = TWO_MODES.denoise(schedule), flow_grid(schedule, 50)
    noise = invert(denoise, schedule, z, grid)
    assert relative(regenerate(denoise, schedule, noise, grid), z) < BAR / 10
    assert relative(noise, z) > 0.3


def test_there_and_back_on_a_network(net):
    schedule, z = net.schedule, data((6, 3, 2, 2))
    assert (net(z, torch.full((6,), 0.5)) - z).abs().mean() > 0.3  # it does something
    for steps in (50, 12):
        grid = flow_grid(schedule, steps)
        noise = invert(net, schedule, z, grid)
        assert relative(regenerate(net, schedule, noise, grid), z) < BAR / 10, steps
    naive = sample(net, schedule, schedule.alpha(grid[-1]) * z, grid.flip(0), "heun")  # what correction is for
    assert relative(regenerate(net, schedule, naive, grid), z) > BAR


def test_the_noise_is_that_of_the_true_flow():
    """Heun's order shows in the noise too: only going there and back is exact at any number of steps."""
    schedule, z = make_schedule("flow"), torch.linspace(-1.8, 1.4, 9, dtype=torch.float64)
    near = float(flow_grid(schedule, 1)[-1])
    exact = TWO_MODES.flow(schedule, near, 1.0, (1 - near) * z)
    steps = [24, 48, 96]
    errors = [
        float((invert(TWO_MODES.denoise(schedule), schedule, z, flow_grid(schedule, n)) - exact).abs().mean())
        for n in steps
    ]
    assert abs(order(steps, errors) - 2) < 0.3, errors
    assert errors[-1] < 5e-3


def test_drawn_data_become_standard_noise():
    schedule = make_schedule("flow")
    noise = invert(TWO_MODES.denoise(schedule), schedule, data((4000, 1)), flow_grid(schedule, 50)).flatten().double()
    empirical = torch.arange(1, 4001) / 4000
    gap = (torch.special.ndtr(noise.sort().values) - empirical).abs().max()
    assert gap < 1.63 / 4000**0.5  # Kolmogorov and Smirnov at 1 %


def test_an_item_is_the_same_whatever_is_beside_it(net):
    z, grid = data((6, 3, 2, 2)), flow_grid(net.schedule, 10)
    whole = invert(net, net.schedule, z, grid)
    parts = torch.cat([invert(net, net.schedule, z[i : i + 2], grid) for i in (0, 2, 4)])
    assert torch.allclose(whole, parts, atol=1e-4)


def test_a_step_is_undone():
    schedule, z = make_schedule("cosine"), data((16, 2)).double()
    t, s = (torch.tensor(x, dtype=torch.float64) for x in (0.3, 0.45))
    for name in ("ddim", "heun"):
        step, denoise = SAMPLERS[name], TWO_MODES.denoise(schedule)
        ahead, _, _ = Undo(step)(denoise, schedule, z, t, s, None, None)
        assert relative(step(denoise, schedule, ahead, s, t, None, None)[0], z) < 1e-5


def test_fixed_points_that_plain_iteration_misses():
    """The map's slope is -3 to 0.9: iterated as it is, it flies apart."""
    a = torch.linspace(-3, 0.9, 4, dtype=torch.float64)
    b = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(fixed_point(lambda z: a * z + b, torch.zeros_like(b)), b / (1 - a)) < 1e-5


def test_slerp():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 4, generator=generator) for _ in range(2))
    w = torch.linspace(0, 1, 5)
    path = slerp(a, b, w)
    assert path.shape == (5, 3, 4, 4) and torch.equal(path[0], a) and torch.equal(path[-1], b)
    unit = slerp(a / a.norm(), b / b.norm(), w)
    assert torch.allclose(unit.flatten(1).norm(dim=1), torch.ones(5), atol=1e-6)
    angles = (unit[:-1] * unit[1:]).flatten(1).sum(1).clamp(-1, 1).acos()
    assert torch.allclose(angles, angles[:1].expand(4), atol=1e-3)  # even steps
    assert torch.allclose(slerp(a, a, w), a.expand(5, 3, 4, 4), atol=1e-6)  # no angle: a straight line
