"""Flow maps: a jump with the right z_hat lands where the flow does, and a trajectory's parts hold those z_hats."""

import pytest
import torch
from torch import nn

from sfumato.core import SCHEDULES, Denoiser, Jump, fly, joined, landing, make_schedule, sample, shaken, time_grid
from sfumato.nn import make_net
from sfumato.nn.blocks import with_clocks
from sfumato.types import Cond
from tests.core.exact import GAUSSIAN, TWO_MODES, Mixture

NAMES = [name for name in SCHEDULES if name not in ("table", "ve")]
NETS = {"mlp": {"width": 32, "depth": 2}, "dit": {"width": 32, "depth": 2, "heads": 2, "patch": 1}}
NETS["unet"] = {"width": 32, "depth": 1, "heads": 2}


def noise(count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow_map(mixture: Mixture, schedule):
    """(z, t, s) -> the z_hat with which the flow of a mixture goes from t to s, exactly."""

    def toward(z, t, s):
        ends = [mixture.flow(schedule, a, b, row) for row, a, b in zip(z, t, s, strict=True)]
        return landing(schedule, z, torch.stack(ends), t, s)

    return toward


@pytest.mark.parametrize("name", NAMES)
def test_landing_is_what_a_jump_needs(name: str):
    schedule, (z, end) = make_schedule(name), (noise(6), noise(6, 1))
    t = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
    s = torch.tensor([0.0, 0.5, 0.2, 0.4, 0.0, 0.05], dtype=torch.float64)
    jump = Jump(lambda z, t, s: landing(schedule, z, end, t, s))
    there, _, z_hat = jump(lambda z, t: z, schedule, z, t, s, None, None)
    assert torch.allclose(there, end, atol=1e-8)
    assert torch.equal(z_hat[s == 0], end[s == 0])  # where it arrives it is the end itself


@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm"])
@pytest.mark.parametrize("mixture", [GAUSSIAN, TWO_MODES], ids=["gaussian", "mixture"])
def test_any_number_of_jumps_ends_where_the_flow_does(mixture: Mixture, name: str):
    schedule, start = make_schedule(name), 0.98
    z = noise(20) * sum(x**2 for x in schedule(start)).sqrt()
    wanted = mixture.flow(schedule, start, 0.02, z[:, 0])
    step = Jump(flow_map(mixture, schedule))
    for jumps in (1, 2, 5):
        grid = time_grid(schedule, jumps, t_max=start, t_min=0.02)
        found = sample(mixture.denoise(schedule), schedule, z, grid, step)
        assert torch.allclose(found[:, 0], wanted, atol=1e-6)
    plain = sample(mixture.denoise(schedule), schedule, z, time_grid(schedule, 1, t_max=start, t_min=0.02), "ddim")
    assert float((plain[:, 0] - wanted).abs().mean()) > 0.03  # which one step of a plain sampler does not


def test_trajectories_follow_the_flow():
    schedule, z = make_schedule("flow"), noise(100)
    errors = []
    for knots in (8, 16, 32):
        grid = shaken(time_grid(schedule, knots), torch.linspace(-0.5, 0.5, len(z)))
        flights = fly(TWO_MODES.denoise(schedule), schedule, z, grid)
        assert flights.z.shape == (knots + 1, len(z), 1) and flights.z_hat.shape == (knots, len(z), 1)
        assert torch.equal(flights.z[0], z) and (len(flights), flights.knots) == (len(z), knots)
        middle = knots // 2
        exact = [TWO_MODES.flow(schedule, 1.0, float(t), x) for t, x in zip(grid[middle], z, strict=True)]
        errors.append(float((flights.z[middle] - torch.stack(exact)).abs().mean()))
    assert errors[0] < 0.02 and errors[0] > 2.5 * errors[1] > 6 * errors[2], errors


def test_parts_of_trajectories():
    """Where a part has a length its z_hat leads to its end, where it has none it is the denoiser's."""
    schedule = make_schedule("flow")
    grid = shaken(time_grid(schedule, 4), torch.tensor([-0.4, 0.0, 0.3]))
    flights = fly(TWO_MODES.denoise(schedule), schedule, noise(3), grid)
    item, i, j = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([0, 1, 2, 3, 2]), torch.tensor([4, 2, 4, 3, 2])
    z, t, s, z_hat = flights.leg(schedule, item, i, j)
    assert torch.equal(t, grid[i, item]) and torch.equal(s, grid[j, item]) and torch.equal(z, flights.z[i, item])
    there, *_ = Jump(lambda *_: z_hat)(lambda z, t: z, schedule, z, t, s, None, None)
    assert torch.allclose(there[:3], flights.z[j, item][:3], atol=1e-12)
    assert torch.equal(z_hat[3:], flights.z_hat[i, item][3:])
    both = joined([flights, fly(TWO_MODES.denoise(schedule), schedule, noise(2, 1), grid[:, :2])])
    assert len(both) == 5 and torch.equal(both.leg(schedule, item, i, j)[3], z_hat)


def test_shaken_times():
    grid = time_grid(make_schedule("flow"), 8)
    shift = torch.linspace(-0.5, 0.5, 1001)
    times = shaken(grid, shift)
    assert torch.allclose(times[:, 500], grid, atol=1e-9) and bool((times.diff(dim=0) < 0).all())
    assert set(times[0].tolist()) == {1.0} and set(times[-1].tolist()) == {0.0}
    inner = times[1:-1].flatten().sort().values
    assert float(inner.diff().max()) < 1e-3 and inner[[0, -1]].tolist() == pytest.approx([1 / 16, 15 / 16])


@pytest.mark.parametrize("name", NETS)
def test_a_second_clock_is_not_heeded_at_first(name: str):
    generator = torch.Generator().manual_seed(0)
    shape, schedule = (2, 4, 4), make_schedule("flow")
    net = make_net(name, latent_shape=shape, cond_dim=3, **NETS[name])
    for weight in net.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    more = make_net(name, latent_shape=shape, cond_dim=3, clocks=2, **NETS[name])
    more.load_state_dict(with_clocks(net.state_dict(), 2))
    teacher, student = Denoiser(net, schedule), Denoiser(more, schedule, jumps=True)
    z, cond = torch.randn(5, *shape, generator=generator), Cond(torch.randn(5, 3, generator=generator))
    t, s = torch.rand(2, 5, generator=generator, dtype=torch.float64).sort(0, descending=True).values
    wanted = teacher(z, t, cond)
    assert torch.allclose(student(z, t, cond), wanted, atol=1e-5)
    assert torch.allclose(student(z, t, cond, s=s), wanted, atol=1e-5)
    more.embedding.clock_in.weight.data[:, net.embedding.clock_in.weight.shape[1] :] += 0.5
    assert not torch.allclose(student(z, t, cond, s=s), student(z, t, cond), atol=1e-3)
    assert torch.equal(student(z, t, cond, s=t), student(z, t, cond))


class Clocks(nn.Module):
    """Remembers the clocks it was handed."""

    def forward(self, z, clocks, cond, mask):
        self.clocks = clocks
        return z


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_clocks_of_both_ends(shape: tuple[int, ...]):
    t, s = torch.full(shape, 0.7, dtype=torch.float64), torch.full(shape, 0.2, dtype=torch.float64)
    denoiser = Denoiser(Clocks(), make_schedule("flow"), jumps=True)
    denoiser(torch.zeros(*shape[:1], 3, 2), t, s=s)
    assert denoiser.net.clocks.shape == (*shape, 2)
    assert torch.allclose(denoiser.net.clocks[..., 0], denoiser.clock(t).float())
    assert torch.allclose(denoiser.net.clocks[..., 1], denoiser.clock(s).float())
    plain = Denoiser(Clocks(), make_schedule("flow"))
    plain(torch.zeros(*shape[:1], 3, 2), t)
    assert plain.net.clocks.shape == (*shape, 1)
