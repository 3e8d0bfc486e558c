"""Inversion inverts sampling exactly, converges to the exact flow's noise, and does not depend on the batch."""

import pytest
import torch

from sfumato.core import Denoiser, integrate_to_data, inversion_grid, invert, make_schedule, sample, slerp
from sfumato.core.inversion import InverseStep, fixed_point
from sfumato.core.sampler import SAMPLERS
from sfumato.nn import make_net
from tests.core.exact import TWO_MODES, order

TOLERANCE = 1e-3  # relative error of a round trip at 50 steps


def relative_error(a, b):
    """The largest relative error of an item."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def data(shape):
    z = TWO_MODES.sample(int(torch.Size(shape).numel()), torch.Generator().manual_seed(0))
    return z.float().reshape(shape)


@pytest.fixture(scope="module")
def net():
    """A network with random weights and a strongly curved flow."""
    torch.manual_seed(0)
    net = make_net("mlp", latent_shape=(3, 2, 2), cond_dim=0, width=32, depth=2).requires_grad_(False)
    for weight in net.parameters():
        weight.add_(torch.randn(weight.shape), alpha=0.2)
    return Denoiser(net, make_schedule("flow"), "flow").eval()


@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm"])
def test_round_trip_on_the_mixture(name):
    schedule, z = make_schedule(name), data((32, 4))
    levels = schedule.levels(inversion_grid(schedule, 50))
    noise = invert(TWO_MODES.denoise, levels, z)
    assert relative_error(integrate_to_data(TWO_MODES.denoise, levels, noise), z) < TOLERANCE / 10
    assert relative_error(noise, z) > 0.3


def test_round_trip_on_a_network(net):
    schedule, z = net.schedule, data((6, 3, 2, 2))
    assert (net(z, schedule(0.5)) - z).abs().mean() > 0.3  # the network has an effect
    for steps in (50, 12):
        levels = schedule.levels(inversion_grid(schedule, steps))
        noise = invert(net, levels, z)
        assert relative_error(integrate_to_data(net, levels, noise), z) < TOLERANCE / 10, steps
    naive = sample(net, levels[::-1], levels[-1].alpha * z, "heun")  # without the fixed point
    assert relative_error(integrate_to_data(net, levels, naive), z) > TOLERANCE


def test_noise_converges_to_that_of_the_exact_flow():
    """The noise converges at Heun's order; only the round trip is exact at any number of steps."""
    schedule, z = make_schedule("flow"), torch.linspace(-1.8, 1.4, 9, dtype=torch.float64)
    t_min = float(inversion_grid(schedule, 1)[-1])
    exact = TWO_MODES.flow(schedule, t_min, 1.0, (1 - t_min) * z)
    steps = [24, 48, 96]
    levels = [schedule.levels(inversion_grid(schedule, n)) for n in steps]
    errors = [float((invert(TWO_MODES.denoise, path, z) - exact).abs().mean()) for path in levels]
    assert abs(order(steps, errors) - 2) < 0.3, errors
    assert errors[-1] < 5e-3


def test_inverted_data_are_standard_normal():
    schedule = make_schedule("flow")
    levels = schedule.levels(inversion_grid(schedule, 50))
    noise = invert(TWO_MODES.denoise, levels, data((4000, 1))).flatten().double()
    empirical = torch.arange(1, 4001) / 4000
    gap = (torch.special.ndtr(noise.sort().values) - empirical).abs().max()
    assert gap < 1.63 / 4000**0.5  # Kolmogorov-Smirnov test at 1 %


def test_an_item_does_not_depend_on_its_batch(net):
    z, levels = data((6, 3, 2, 2)), net.schedule.levels(inversion_grid(net.schedule, 10))
    whole = invert(net, levels, z)
    parts = torch.cat([invert(net, levels, z[i : i + 2]) for i in (0, 2, 4)])
    assert torch.allclose(whole, parts, atol=1e-4)


def test_a_step_is_inverted():
    schedule, z = make_schedule("cosine"), data((16, 2)).double()
    at_t, at_s = schedule(0.3), schedule(0.45)
    for name in ("ddim", "heun"):
        step, denoise = SAMPLERS[name], TWO_MODES.denoise
        z_s, _, _ = InverseStep(step)(denoise, z, at_t, at_s, None, None)
        assert relative_error(step(denoise, z_s, at_s, at_t, None, None)[0], z) < 1e-5


def test_fixed_points_where_plain_iteration_diverges():
    """The map's slope is -3 to 0.9, so plain iteration diverges."""
    a = torch.linspace(-3, 0.9, 4, dtype=torch.float64)
    b = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(fixed_point(lambda z: a * z + b, torch.zeros_like(b)), b / (1 - a)) < 1e-5


def test_slerp():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 4, generator=generator) for _ in range(2))
    w = torch.linspace(0, 1, 5)
    path = slerp(a, b, w)
    assert path.shape == (5, 3, 4, 4) and torch.equal(path[0], a) and torch.equal(path[-1], b)
    unit = slerp(a / a.norm(), b / b.norm(), w)
    assert torch.allclose(unit.flatten(1).norm(dim=1), torch.ones(5), atol=1e-6)
    angles = (unit[:-1] * unit[1:]).flatten(1).sum(1).clamp(-1, 1).acos()
    assert torch.allclose(angles, angles[:1].expand(4), atol=1e-3)  # uniform steps
    assert torch.allclose(slerp(a, a, w), a.expand(5, 3, 4, 4), atol=1e-6)  # angle 0: linear interpolation
