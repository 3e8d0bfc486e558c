"""Consistency steps sample the data, and trajectories of the probability flow lead to its end."""

import pytest
import torch
from torch import nn

from sfumato.core import (
    SCHEDULES,
    ConsistencyStep,
    Denoiser,
    TrajectoryDenoiser,
    concat,
    initial_noise,
    integrate_trajectories,
    jitter,
    make_schedule,
    sample,
    time_grid,
)
from sfumato.core.denoiser import clock
from sfumato.nn import make_net
from sfumato.nn.layers import pad_clock_weights
from sfumato.types import Cond
from tests.core.exact import TWO_MODES, Mixture

NAMES = [name for name in SCHEDULES if name not in ("table", "ve")]
NETS = {"mlp": {"width": 32, "depth": 2}, "dit": {"width": 32, "depth": 2, "heads": 2, "patch": 1}}
NETS["unet"] = {"width": 32, "depth": 1, "heads": 2}


def noise(count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def consistency_function(mixture: Mixture, schedule):
    """(z, level) -> the exact end of a mixture's flow, for a scalar level."""
    return lambda z, level: mixture.flow(schedule, float(level.t), 1e-3, z[:, 0])[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_consistency_step_returns_f_or_adds_noise_to_it(name: str):
    schedule, (z, w), end = make_schedule(name), (noise(6), noise(6, 1)), noise(6, 2)
    t = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
    s = torch.tensor([0.0, 0.5, 0.2, 0.4, 0.0, 0.05], dtype=torch.float64)
    at_s = schedule(s)
    z_s, _, z_hat = ConsistencyStep(lambda z, level: end)(lambda z, level: z, z, schedule(t), at_s, lambda: w, None)
    assert torch.equal(z_hat, end) and torch.equal(z_s[s == 0], end[s == 0])
    expected = at_s.alpha[:, None] * end + at_s.sigma[:, None] * w
    assert torch.allclose(z_s[s > 0], expected[s > 0], atol=1e-8)


def test_consistency_steps_need_noise_except_the_last():
    schedule, step = make_schedule("flow"), ConsistencyStep(lambda z, level: z)
    assert step.stochastic
    arguments = (lambda z, level: z, noise(3), schedule(1.0))
    assert torch.equal(step(*arguments, schedule(0.0), None, None)[0], noise(3))
    with pytest.raises(ValueError, match="consistency steps need `noise`"):
        step(*arguments, schedule(0.5), None, None)


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_consistency_steps_samples_the_data(name: str, steps: int):
    schedule, generator = make_schedule(name), torch.Generator().manual_seed(steps)
    draw = lambda: torch.randn(400, 1, generator=generator, dtype=torch.float64)
    levels = schedule.levels(time_grid(schedule, steps, "data"))
    step = ConsistencyStep(consistency_function(TWO_MODES, schedule))
    samples = sample(TWO_MODES.denoise, levels, initial_noise(levels[0], draw), step, draw)[:, 0]
    data = TWO_MODES.sample(400, torch.Generator().manual_seed(9))
    fractions = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    gap = (samples.quantile(fractions) - data.quantile(fractions)).abs()
    assert float(gap.mean()) < 0.12, gap
    ends = schedule.levels(time_grid(schedule, 1))
    one_step = sample(TWO_MODES.denoise, ends, initial_noise(ends[0], draw), "ddim")
    assert float(one_step.std()) < 0.1  # one step of a plain sampler gives the mean for any noise


def test_trajectories_follow_the_flow():
    schedule, z = make_schedule("flow"), noise(100)
    errors = []
    for steps in (8, 16, 32):
        grid = jitter(time_grid(schedule, steps), torch.linspace(-0.5, 0.5, len(z)))
        trajectories = integrate_trajectories(TWO_MODES.denoise, schedule.levels(grid), z)
        assert trajectories.z.shape == (steps + 1, len(z), 1) and trajectories.z_hat.shape == (steps, len(z), 1)
        assert torch.equal(trajectories.z[0], z) and (len(trajectories), trajectories.steps) == (len(z), steps)
        middle = steps // 2
        exact = [TWO_MODES.flow(schedule, 1.0, float(t), x) for t, x in zip(grid[middle], z, strict=True)]
        errors.append(float((trajectories.z[middle] - torch.stack(exact)).abs().mean()))
    assert errors[0] < 0.02 and errors[0] > 2.5 * errors[1] > 6 * errors[2], errors


def test_training_pairs_of_trajectories():
    """The target is the trajectory's end; for an anchor it is the denoiser's output."""
    schedule = make_schedule("flow")
    grid = jitter(time_grid(schedule, 4), torch.tensor([-0.4, 0.0, 0.3]))
    trajectories = integrate_trajectories(TWO_MODES.denoise, schedule.levels(grid), noise(3))
    item, step, anchor = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([0, 1, 2, 3, 2]), torch.arange(5) > 2
    z, t, s, target = trajectories.training_pairs(item, step, anchor)
    assert torch.equal(t, grid[step, item]) and torch.equal(z, trajectories.z[step, item])
    assert s[:3].tolist() == [0, 0, 0] and torch.equal(s[3:], t[3:])
    assert torch.equal(target[:3], trajectories.z[-1, item][:3])
    assert torch.equal(target[3:], trajectories.z_hat[step, item][3:])
    more = integrate_trajectories(TWO_MODES.denoise, schedule.levels(grid[:, :2]), noise(2, 1))
    both = concat([trajectories, more])
    assert len(both) == 5 and torch.equal(both.training_pairs(item, step, anchor)[3], target)


def test_jittered_times_are_uniform():
    grid = time_grid(make_schedule("flow"), 8)
    shift = torch.linspace(-0.5, 0.5, 1001)
    times = jitter(grid, shift)
    assert torch.allclose(times[:, 500], grid, atol=1e-9) and bool((times.diff(dim=0) < 0).all())
    assert set(times[0].tolist()) == {1.0} and set(times[-1].tolist()) == {0.0}
    inner = times[1:-1].flatten().sort().values
    assert float(inner.diff().max()) < 1e-3 and inner[[0, -1]].tolist() == pytest.approx([1 / 16, 15 / 16])


@pytest.mark.parametrize("name", NETS)
def test_padded_second_clock_has_no_effect_at_first(name: str):
    generator = torch.Generator().manual_seed(0)
    shape, schedule = (2, 4, 4), make_schedule("flow")
    net = make_net(name, latent_shape=shape, cond_dim=3, **NETS[name])
    for weight in net.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    more = make_net(name, latent_shape=shape, cond_dim=3, clocks=2, **NETS[name])
    more.load_state_dict(pad_clock_weights(net.state_dict(), 2))
    teacher, student = Denoiser(net, schedule), TrajectoryDenoiser(more, schedule)
    z, cond = torch.randn(5, *shape, generator=generator), Cond(torch.randn(5, 3, generator=generator))
    times = torch.rand(2, 5, generator=generator, dtype=torch.float64).sort(0, descending=True).values
    at_t, at_s = schedule.levels(times)
    expected = teacher(z, at_t, cond)
    assert torch.allclose(student(z, at_t, cond), expected, atol=1e-5)
    assert torch.allclose(student(z, at_t, cond, end=at_s), expected, atol=1e-5)
    more.embedding.clock_in.weight.data[:, net.embedding.clock_in.weight.shape[1] :] += 0.5
    assert not torch.allclose(student(z, at_t, cond, end=at_s), student(z, at_t, cond), atol=1e-3)
    assert torch.equal(student(z, at_t, cond, end=at_t), student(z, at_t, cond))


class Clocks(nn.Module):
    """A network that records its clocks."""

    def forward(self, z, clocks, cond, mask):
        self.clocks = clocks
        return z


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_network_with_two_times_gets_the_clocks_of_both(shape: tuple[int, ...]):
    schedule = make_schedule("flow")
    at_t, at_s = (schedule(torch.full(shape, t, dtype=torch.float64)) for t in (0.7, 0.2))
    denoiser = TrajectoryDenoiser(Clocks(), schedule)
    denoiser(torch.zeros(*shape[:1], 3, 2), at_t, end=at_s)
    assert denoiser.net.clocks.shape == (*shape, 2)
    assert torch.allclose(denoiser.net.clocks[..., 0], clock(at_t).float())
    assert torch.allclose(denoiser.net.clocks[..., 1], clock(at_s).float())
    plain = Denoiser(Clocks(), schedule)
    plain(torch.zeros(*shape[:1], 3, 2), at_t)
    assert plain.net.clocks.shape == (*shape, 1)
