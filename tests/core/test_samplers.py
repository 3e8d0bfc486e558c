"""Every sampler converges at its order on exact denoisers, ends on z_hat, and accepts times of any layout."""

import math

import pytest
import torch

from sfumato.core import (
    GRIDS,
    SAMPLERS,
    Noise,
    denoiser_evaluations,
    initial_noise,
    make_schedule,
    sample,
    steps,
    time_grid,
)
from sfumato.core.sampler import Multistep
from tests.core.exact import GAUSSIAN, TWO_MODES, order

SPANS = [("flow", 0.95, 0.05), ("cosine", 0.95, 0.05), ("edm", 0.8, 0.1)]
ORDERS = {
    "ddim": 1,
    "euler": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "unipc": 3,
    "abm2": 2,
}  # the corrector raises the order of UniPC-2 by one
STEPS = [48, 96, 192]
MANY_STEPS = {"abm2": [512, 1024, 2048]}  # its second-order term is small and visible only with many steps


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two_modes"])
@pytest.mark.parametrize(("name", "start", "stop"), SPANS)
@pytest.mark.parametrize("sampler", [name for name in ORDERS if name != "euler"])
def test_order(data, name, start, stop, sampler):
    schedule = make_schedule(name)
    mean, variance = data.moments(schedule, start)
    z = mean + variance**0.5 * torch.linspace(-2, 2, 15, dtype=torch.float64)
    exact = data.flow(schedule, start, stop, z)
    counts, errors = MANY_STEPS.get(sampler, STEPS), []
    for n in counts:
        got = sample(data.denoise, schedule.levels(time_grid(schedule, n, "uniform", start, stop)), z, sampler)
        errors.append(float((got - exact).square().mean().sqrt()))
    assert abs(order(counts, errors) - ORDERS[sampler]) < 0.25, errors
    assert errors[-1] < (0.03 if ORDERS[sampler] == 1 else 2e-3)


def test_every_sampler_has_an_order():
    assert set(ORDERS) | {"ddpm", "sde"} == set(SAMPLERS)
    assert SAMPLERS["euler"] == SAMPLERS["ddim"]


@pytest.mark.parametrize(("name", "start", "stop"), SPANS)
@pytest.mark.parametrize(("sampler", "weak"), [("ddpm", 1), ("sde", 2)])
def test_weak_order_gaussian(name, start, stop, sampler, weak):
    """z_s is affine in the start and the noise: unit noise, one per row, gives its mean and variance exactly."""
    schedule = make_schedule(name)
    mean, variance = GAUSSIAN.moments(schedule, start)
    first = mean + 1.5 * variance**0.5
    exact_mean, exact_variance = GAUSSIAN.conditional_moments(schedule, start, stop, first)
    errors = []
    for n in STEPS:
        noises = iter(torch.eye(n + 1, dtype=torch.float64)[1:])  # row 0 gets no noise
        z = torch.full((n + 1,), first, dtype=torch.float64)
        levels = schedule.levels(time_grid(schedule, n, "uniform", start, stop))
        z = sample(GAUSSIAN.denoise, levels, z, sampler, lambda noises=noises: next(noises))
        assert abs(float(z[0]) - exact_mean) < 1e-12  # z_hat is a martingale: the mean is exact at any step size
        errors.append(abs(float(((z - z[0]) ** 2).sum()) - exact_variance))
    assert abs(order(STEPS, errors) - weak) < 0.25, errors


@pytest.mark.parametrize(("name", "start", "stop"), [("flow", 0.9, 0.1), ("edm", 0.6, 0.15)])
@pytest.mark.parametrize(("sampler", "weak"), [("ddpm", 0.75), ("sde", 1.5)])
def test_weak_order_two_modes(name, start, stop, sampler, weak):
    schedule, n = make_schedule(name), 100_000
    mean, variance = TWO_MODES.moments(schedule, start)
    first = mean + 0.5 * variance**0.5
    exact = torch.tensor(TWO_MODES.conditional_moments(schedule, start, stop, first))
    generator = torch.Generator().manual_seed(0)
    errors = []
    for count in (6, 24):
        z = torch.full((n,), first, dtype=torch.float64)
        levels = schedule.levels(time_grid(schedule, count, "uniform", start, stop))
        z = sample(TWO_MODES.denoise, levels, z, sampler, lambda: torch.randn(n, generator=generator))
        errors.append((torch.stack([z.mean(), z.var()]) - exact).abs())
    fall = torch.log(errors[0] / errors[1].clamp_min(0.004)) / torch.log(torch.tensor(4.0))  # 0.004: sampling error
    assert fall[1] > weak, errors
    assert fall[0] > 0.5, errors


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm", "walk"])
@pytest.mark.parametrize("spacing", GRIDS)
def test_ends_on_z_hat(sampler, name, spacing):
    schedule = make_schedule(name)
    noise = Noise(0, range(4), (3,))
    grid = time_grid(schedule, 6, spacing)
    levels = schedule.levels(grid)
    start = initial_noise(levels[0], noise)
    seen = list(steps(GAUSSIAN.denoise, levels, start, sampler, noise))
    z = seen[-1].z
    assert z.dtype == torch.float32 and z.isfinite().all()
    assert len(seen) == 6 and torch.equal(z, seen[-1].z_hat)
    assert torch.equal(torch.stack([taken.level.t for taken in seen]), grid[1:])
    again = Noise(0, range(4), (3,))
    assert torch.equal(sample(GAUSSIAN.denoise, levels, initial_noise(levels[0], again), sampler, again), z)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_quantiles_of_the_data(sampler):
    """The quantiles of 4,000 samples are those of the data."""
    schedule = make_schedule("flow")
    noise = Noise(1, range(4), (1000,))
    levels = schedule.levels(time_grid(schedule, 40))
    z = sample(TWO_MODES.denoise, levels, initial_noise(levels[0], noise), sampler, noise)
    quantiles = TWO_MODES.cdf(schedule, 0.0, z.double().flatten()).sort().values
    assert (quantiles - torch.linspace(0, 1, 4000)).abs().max() < 0.06


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_times_per_item_and_per_token(sampler):
    """A grid with a time per item or token gives each the same result as alone."""
    schedule, count = make_schedule("flow"), 8
    grids = torch.stack(
        [time_grid(schedule, count, t_max=high, t_min=low) for high, low in [(1, 0), (0.9, 0.2), (0.7, 0)]]
    )
    start, noises = torch.randn(2, 3, 5), [torch.randn(2, 3, 5) for _ in range(count)]

    def run(z, grid, cut):
        parts = iter(noises)
        return sample(TWO_MODES.denoise, schedule.levels(grid), z, sampler, lambda: next(parts)[cut])

    separate = [run(start[:, i : i + 1], grid, (slice(None), slice(i, i + 1))) for i, grid in enumerate(grids)]
    tokens = run(start, grids.T[:, None], ...)  # (steps + 1, 1, N)
    assert torch.allclose(tokens, torch.cat(separate, 1), atol=2e-5)
    items = run(start, grids.T[:, :2], ...)  # (steps + 1, B)
    assert torch.allclose(items[1, 1], tokens[1, 1], atol=2e-5)
    assert torch.allclose(items[0, 0], tokens[0, 0], atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clean_tokens_stay_unchanged(sampler):
    schedule, noise = make_schedule("flow"), Noise(0, range(2), (2, 4))
    z = torch.randn(2, 2, 4)
    grid = time_grid(schedule, 5)[:, None, None] * torch.tensor([0.0, 1.0])  # the first token has no noise
    out = sample(GAUSSIAN.denoise, schedule.levels(grid), z, sampler, noise)
    assert out.isfinite().all() and torch.equal(out[:, 0], z[:, 0]) and not torch.equal(out[:, 1], z[:, 1])


@pytest.mark.parametrize("name", ["flow", "cosine", "edm", "walk"])
def test_initial_noise_has_the_variance_of_unit_latents(name):
    schedule, ones = make_schedule(name, **({"steps": 4, "tau": 0.5} if name == "walk" else {})), lambda: torch.ones(2)
    for t in (1.0, 0.4):
        level = schedule(t)
        variance = (level.alpha**2 + level.sigma**2).expand(2)
        assert torch.allclose(initial_noise(level, ones).double() ** 2, variance, rtol=1e-5)


def test_evaluations_per_step():
    schedule, calls = make_schedule("flow"), []
    denoise = lambda z, level: calls.append(level) or GAUSSIAN.denoise(z, level)
    counts = {}
    for name in SAMPLERS:
        calls.clear()
        sample(denoise, schedule.levels(time_grid(schedule, 5)), torch.randn(4), name, lambda: torch.randn(4))
        counts[name] = len(calls)
        assert all(value.shape == () for level in calls for value in level)
    assert counts == {name: 9 if name == "heun" else 5 for name in SAMPLERS}
    assert counts == {name: denoiser_evaluations(name, 5) for name in SAMPLERS}


def test_custom_step_rules_work():
    schedule = make_schedule("flow")
    rule = SAMPLERS["ddim"]
    assert isinstance(rule, Multistep)
    seen = []

    def wrapped(denoise, z, at_t, at_s, noise, state):
        seen.append(float(at_t.t))
        return rule(denoise, z * 1.0, at_t, at_s, noise, state)

    z, levels = torch.randn(3, 2), schedule.levels(time_grid(schedule, 4))
    out = sample(GAUSSIAN.denoise, levels, z, wrapped)
    assert torch.equal(out, sample(GAUSSIAN.denoise, levels, z, "ddim"))
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_errors_suggest_the_nearest_name():
    schedule, z = make_schedule("flow"), torch.randn(2)
    levels = schedule.levels(time_grid(schedule, 2))
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        sample(GAUSSIAN.denoise, levels, z, "huen")
    with pytest.raises(ValueError, match="noise"):
        sample(GAUSSIAN.denoise, levels, z, "ddpm")
    with pytest.raises(ValueError, match="'karras'"):
        time_grid(schedule, 2, "karas")
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(schedule, 0)


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm", "walk"])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_grids_decrease(spacing, name, count):
    schedule = make_schedule(name)
    for high, low in [(1.0, 0.0), (0.8, 0.1)]:
        grid = time_grid(schedule, count, spacing, high, low)
        assert grid.shape == (count + 1,) and grid.dtype == torch.float64
        assert grid[0] == high and grid[-1] == low and (grid.diff() < 0).all()


@pytest.mark.parametrize("spacing", ["uniform", "both_ends"])
def test_grids_in_time(spacing):
    """Both are symmetric; the end steps of `both_ends` are slightly more than half a uniform step."""
    grid, even = (time_grid(make_schedule("flow"), 20, k, 0.9, 0.1) for k in (spacing, "uniform"))
    assert torch.allclose(grid + grid.flip(0), torch.ones(21, dtype=torch.float64), atol=1e-12)
    first = float((grid[0] - grid[1]) / (even[0] - even[1]))
    assert first == pytest.approx(1.0 if spacing == "uniform" else 0.5 + 10 * math.sin(math.pi / 40) ** 2)


@pytest.mark.parametrize(("spacing", "power"), [("noise", 2), ("data", 2 / 3)])
def test_consistency_grids_are_uniform_in_a_power_of_t(spacing: str, power: float):
    grid = time_grid(make_schedule("flow"), 4, spacing)
    assert torch.allclose(grid**power, torch.linspace(1, 0, 5, dtype=torch.float64), atol=1e-12)


def test_abm2_is_exact_for_z_hat_linear_in_the_angle():
    """If z_hat is linear in the angle and independent of z, two steps are exact, as the first is corrected."""
    schedule, start, stop = make_schedule("flow"), 0.95, 0.2
    line = lambda t: 0.3 - 1.7 * torch.atan2(t, 1 - t)
    grid = torch.tensor([start, 0.6, stop], dtype=torch.float64)
    z = torch.tensor([0.4, -1.0], dtype=torch.float64)
    got = sample(lambda z, level: line(level.t).expand_as(z), schedule.levels(grid), z, "abm2")
    tau = torch.linspace(start, stop, 20_001, dtype=torch.float64)  # z / sigma changes by z_hat d(alpha / sigma)
    gain = torch.trapezoid(line(tau) * -1 / tau**2, tau)
    assert torch.allclose(got, stop * (z / start + gain), atol=1e-8)


def test_karras_grid_equals_the_paper():
    """(sigma_max^(1/7) + i / (N - 1) (sigma_min^(1/7) - sigma_max^(1/7)))^7, then 0."""
    schedule, n = make_schedule("edm"), 18
    sigma = schedule.sigma(time_grid(schedule, n + 1, "karras", t_min=1e-9))
    i = torch.arange(n, dtype=torch.float64) / (n - 1)
    paper = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    even = schedule.sigma(time_grid(schedule, n - 1, "uniform"))
    assert torch.allclose(even, paper, rtol=1e-6)
    assert sigma[0] == pytest.approx(80) and sigma[-1] == pytest.approx(0.002, rel=1e-3)
