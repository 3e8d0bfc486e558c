"""Consistency: jumps to where the flow ends draw from the data, and states of trajectories lead to their ends."""

import pytest
import torch
from torch import nn

from sfumato.core import SCHEDULES, Denoiser, Jump, fly, joined, make_schedule, prior, sample, shaken, time_grid
from sfumato.nn import make_net
from sfumato.nn.blocks import with_clocks
from sfumato.types import Cond
from tests.core.exact import TWO_MODES, Mixture

NAMES = [name for name in SCHEDULES if name not in ("table", "ve")]
NETS = {"mlp": {"width": 32, "depth": 2}, "dit": {"width": 32, "depth": 2, "heads": 2, "patch": 1}}
NETS["unet"] = {"width": 32, "depth": 1, "heads": 2}


def noise(count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def end_of(mixture: Mixture, schedule):
    """(z, t) -> where the flow of a mixture ends, exactly, for one time t."""
    return lambda z, t: mixture.flow(schedule, float(t[0]), 1e-3, z[:, 0])[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_a_jump_ends_or_is_noised_anew(name: str):
    schedule, (z, w), end = make_schedule(name), (noise(6), noise(6, 1)), noise(6, 2)
    t = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
    s = torch.tensor([0.0, 0.5, 0.2, 0.4, 0.0, 0.05], dtype=torch.float64)
    there, _, z_hat = Jump(lambda z, t: end)(lambda z, t: z, schedule, z, t, s, lambda: w, None)
    alpha, sigma = schedule(s)
    assert torch.equal(z_hat, end) and torch.equal(there[s == 0], end[s == 0])
    wanted = alpha[:, None] * end + sigma[:, None] * w
    assert torch.allclose(there[s > 0], wanted[s > 0], atol=1e-8)


def test_jumps_want_noise_unless_they_end():
    schedule, jump = make_schedule("flow"), Jump(lambda z, t: z)
    assert jump.stochastic
    ask = (lambda z, t: z, schedule, noise(3), torch.tensor(1.0))
    assert torch.equal(jump(*ask, torch.tensor(0.0), None, None)[0], noise(3))
    with pytest.raises(ValueError, match="jumps need `noise`"):
        jump(*ask, torch.tensor(0.5), None, None)


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("jumps", [1, 2, 4])
def test_any_number_of_jumps_draws_from_the_data(name: str, jumps: int):
    schedule, generator = make_schedule(name), torch.Generator().manual_seed(jumps)
    draw = lambda: torch.randn(400, 1, generator=generator, dtype=torch.float64)
    grid, step = time_grid(schedule, jumps, "late"), Jump(end_of(TWO_MODES, schedule))
    made = sample(TWO_MODES.denoise(schedule), schedule, prior(schedule, draw), grid, step, draw)[:, 0]
    data = TWO_MODES.draw(400, torch.Generator().manual_seed(9))
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    gap = (made.quantile(levels) - data.quantile(levels)).abs()
    assert float(gap.mean()) < 0.12, gap
    plain = sample(TWO_MODES.denoise(schedule), schedule, prior(schedule, draw), time_grid(schedule, 1), "ddim")
    assert float(plain.std()) < 0.1  # one step of a plain sampler: the mean, whatever the noise


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


def test_states_of_trajectories():
    """A state leads to its trajectory's end; one that is still, to what the denoiser said of it."""
    schedule = make_schedule("flow")
    grid = shaken(time_grid(schedule, 4), torch.tensor([-0.4, 0.0, 0.3]))
    flights = fly(TWO_MODES.denoise(schedule), schedule, noise(3), grid)
    item, knot, still = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([0, 1, 2, 3, 2]), torch.arange(5) > 2
    z, t, s, target = flights.at(item, knot, still)
    assert torch.equal(t, grid[knot, item]) and torch.equal(z, flights.z[knot, item])
    assert s[:3].tolist() == [0, 0, 0] and torch.equal(s[3:], t[3:])
    assert torch.equal(target[:3], flights.z[-1, item][:3])
    assert torch.equal(target[3:], flights.z_hat[knot, item][3:])
    both = joined([flights, fly(TWO_MODES.denoise(schedule), schedule, noise(2, 1), grid[:, :2])])
    assert len(both) == 5 and torch.equal(both.at(item, knot, still)[3], target)


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
