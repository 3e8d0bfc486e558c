"""Noise levels: computed once a step and handed on; a scalar one equals that of each item, token or position."""

import pytest
import torch
from torch import nn

from sfumato.core import (
    SAMPLERS,
    ConsistencyStep,
    Denoiser,
    Objective,
    Replace,
    Resample,
    Schedule,
    TrajectoryDenoiser,
    autoguidance,
    cfg,
    integrate_to_data,
    integrate_trajectories,
    interval,
    inversion_grid,
    invert,
    make_schedule,
    reconstruction_guidance,
    sample,
    step_generator,
    time_grid,
)
from sfumato.types import Latent
from tests.core.exact import TWO_MODES

SHAPE = (4, 3)


class Net(nn.Module):
    """A small network, nonlinear in its input and its clocks."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(3, 3, generator=generator) / 2, requires_grad=False)

    def forward(self, z, clocks, cond, mask):
        c = clocks.sum(-1)
        return torch.tanh(z @ self.mix + c.reshape(c.shape + (1,) * (z.ndim - c.ndim)))


def noise_fn(shape=SHAPE):
    """Draws of noise of this shape from a new generator."""
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(shape, generator=generator)


FLOW = make_schedule("flow")


@pytest.fixture
def evaluations(monkeypatch):
    """The times at which a schedule was evaluated, as a level or one coefficient alone."""
    times = []
    evaluate, alpha, sigma = Schedule.__call__, type(FLOW).alpha, type(FLOW).sigma
    inside = []

    def call(self, t):
        times.append(t)
        inside.append(True)
        level = evaluate(self, t)
        inside.clear()
        return level

    def record(function):
        return lambda self, t: (None if inside else times.append(t)) or function(self, t)

    monkeypatch.setattr(Schedule, "__call__", call)
    monkeypatch.setattr(type(FLOW), "alpha", record(alpha))
    monkeypatch.setattr(type(FLOW), "sigma", record(sigma))
    return times


BOUND = Denoiser(Net(), FLOW).bind(None)
WEAK = Denoiser(Net(1), FLOW).bind(None)
OBSERVED = torch.tensor([True, False, False])
DENOISERS = {
    "plain": BOUND,
    "cfg": cfg(BOUND, WEAK, interval(2.0, 0.2, 0.8)),
    "autoguidance": autoguidance(BOUND, WEAK, 1.5),
    "reconstruction_guidance": reconstruction_guidance(
        BOUND, torch.sin, torch.full(SHAPE, 0.5), OBSERVED, torch.full(SHAPE[:1], 0.1)
    ),
}
STEPS = {
    "Replace": Replace(SAMPLERS["ddpm"], torch.ones(SHAPE), OBSERVED),
    "Resample": Resample(SAMPLERS["heun"], 3),
    "ConsistencyStep": ConsistencyStep(TrajectoryDenoiser(Net(), FLOW)),
}


@pytest.mark.parametrize("sampler", [*SAMPLERS, *STEPS])
@pytest.mark.parametrize("denoise", DENOISERS)
def test_sampling_evaluates_the_schedule_once_a_level(evaluations, denoise, sampler):
    levels = FLOW.levels(time_grid(FLOW, 10))
    assert len(evaluations) == 11
    z = sample(DENOISERS[denoise], levels, torch.ones(SHAPE), STEPS.get(sampler, sampler), noise_fn())
    assert z.isfinite().all() and len(evaluations) == 11


def test_a_training_step_evaluates_the_schedule_once(evaluations):
    objective = Objective("learned", "lognormal")
    level = FLOW(objective.sample_times(FLOW, SHAPE[:1], step_generator(0, "diffusion", 0)))
    loss = objective.loss(Denoiser(Net(), FLOW), Latent(torch.ones(SHAPE)), None, level, noise_fn()())
    objective.update_with_losses(level.t, loss)
    assert loss.shape == SHAPE[:1] and len(evaluations) == 1


def test_inversion_and_trajectories_evaluate_no_schedule(evaluations):
    levels = FLOW.levels(inversion_grid(FLOW, 6))
    items = FLOW.levels(time_grid(FLOW, 6)[:, None].expand(-1, SHAPE[0]))
    evaluations.clear()
    integrate_to_data(BOUND, levels, invert(BOUND, levels, torch.ones(SHAPE)))
    integrate_trajectories(BOUND, items, torch.ones(SHAPE))
    assert not evaluations


@pytest.mark.parametrize("denoise", ["exact", *DENOISERS])
@pytest.mark.parametrize("sampler", [*SAMPLERS, *STEPS])
def test_a_scalar_level_samples_as_that_of_each_item(sampler, denoise):
    grid, z = time_grid(FLOW, 10), noise_fn()()
    denoise = TWO_MODES.denoise if denoise == "exact" else DENOISERS[denoise]
    step = STEPS.get(sampler, sampler)
    scalar = sample(denoise, FLOW.levels(grid), z, step, noise_fn())
    items = sample(denoise, FLOW.levels(grid[:, None].expand(-1, SHAPE[0])), z, step, noise_fn())
    assert torch.allclose(scalar, items, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flow", "cosine", "edm", "linear"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_scalar_level_samples_as_that_of_each_position(sampler, name):
    schedule, shape = make_schedule(name), (4, 5, 3)
    grid, z, denoise = time_grid(schedule, 10), noise_fn(shape)(), Denoiser(Net(), schedule)
    scalar, *others = (
        sample(denoise, schedule.levels(times), z, sampler, noise_fn(shape))
        for times in (grid, grid[:, None].expand(-1, 4), grid[:, None, None].expand(-1, 1, 5))
    )
    for other in others:
        assert torch.allclose(scalar, other, rtol=0, atol=1e-6)


def test_map_and_noise():
    level = FLOW(torch.tensor([0.2, 0.7], dtype=torch.float64))
    second = level.map(lambda value: value[1])
    assert all(torch.equal(a, b) for a, b in zip(second, FLOW(0.7), strict=True))
    z, eps = torch.randn(2, 2, 3)
    z_t = level.add_noise(z, eps)
    assert z_t.dtype == torch.float32 and torch.allclose(z_t[1], 0.3 * z[1] + 0.7 * eps[1])
    assert level.add_noise(z.bfloat16(), eps.bfloat16()).dtype == torch.bfloat16
