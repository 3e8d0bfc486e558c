"""Schedules: derivatives, inverses, finite log-SNR, settings; and the random walk's exact moments."""

import json

import pytest
import torch

from sfumato.core import SCHEDULES, make_schedule, sample, time_grid
from tests.core.exact import GAUSSIAN, TWO_MODES

BETAS = tuple(torch.linspace(1e-4, 0.02, 1000).tolist())
SETTINGS = {"table": {"betas": BETAS}}
NAMES = list(SCHEDULES)


def build(name):
    return make_schedule(name, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name):
    schedule, h = build(name), 1e-6
    t = torch.linspace(0.05, 0.95, 37, dtype=torch.float64) + 1e-4  # between the entries of the table
    for value, slope in [(schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)]:
        difference = (value(t + h) - value(t - h)) / (2 * h)
        assert torch.allclose(slope(t), difference, rtol=1e-5, atol=1e-7)
        with torch.inference_mode():
            assert torch.equal(slope(t), slope(t).clone())


@pytest.mark.parametrize("name", NAMES)
def test_inverse(name):
    schedule = build(name)
    t = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)
    assert torch.allclose(schedule.inverse_logsnr(schedule(t).logsnr), t, atol=1e-9)
    ends = schedule.inverse_logsnr(torch.tensor([60.0, -60.0]))
    assert ends[0] < 1e-3 and ends[1] > 1 - 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_and_order(name):
    schedule = build(name)
    t = torch.linspace(0, 1, 301, dtype=torch.float32).reshape(7, 43)
    level = schedule(t)
    assert all(value.shape == t.shape and value.dtype == torch.float64 for value in level)
    lam = level.logsnr.flatten()
    assert lam.isfinite().all() and (lam.diff() < 0).all()
    assert float(level.sigma[0, 0]) < 0.0021 and float(level.alpha[0, 0]) == 1.0
    assert schedule.alpha(0.5).shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_settings_rebuild_the_schedule(name):
    schedule = build(name)
    again = make_schedule(**json.loads(json.dumps(schedule.settings())))
    assert again == schedule and torch.equal(again.sigma(0.37), schedule.sigma(0.37))


@pytest.mark.parametrize("name", ["cosine", "linear", "table"])
def test_variance_preserving(name):
    level = build(name)(torch.linspace(0, 1, 101))
    assert torch.allclose(level.alpha**2 + level.sigma**2, torch.ones(101, dtype=torch.float64), atol=1e-12)


def test_table_matches_its_betas():
    alphas_cumprod = torch.cumprod(1 - torch.tensor(BETAS, dtype=torch.float64), 0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(build("table").alpha(t) ** 2, alphas_cumprod, rtol=1e-10)


def test_linear_is_the_limit_of_its_table():
    steps = torch.linspace(0.1, 20, 20_000, dtype=torch.float64) / 20_000
    t = torch.linspace(0, 1, 11)
    fine = make_schedule("table", betas=tuple(steps.tolist()))
    assert torch.allclose(fine.alpha(t), make_schedule("linear").alpha(t), atol=1e-3)


def test_errors_suggest_the_nearest_name():
    with pytest.raises(ValueError, match=r"'cosin'.*did you mean 'cosine'"):
        make_schedule("cosin")
    with pytest.raises(ValueError, match=r"'sigma_mx'.*did you mean 'sigma_max'"):
        make_schedule("edm", sigma_mx=3.0)
    with pytest.raises(ValueError, match="betas"):
        make_schedule("table", betas=(0.1, 1.2))


# The walk z_k = z_{k-1} + sqrt(tau) w_k.

STEPS, TAU, N = 50, 0.04, 40_000


def randn(generator):
    return torch.randn(N, generator=generator, dtype=torch.float64)


def random_walk(data, generator):
    """The walk, data, and data after all steps of the walk."""
    walk = make_schedule("walk", steps=STEPS, tau=TAU)
    z_0 = data.sample(N, generator)
    z = z_0
    for _ in range(STEPS):
        z = walk.forward_step(z, randn(generator))
    return walk, z_0, z


def assert_moments(z, mean, variance):
    """Within four standard errors of a mean and a variance."""
    assert abs(float(z.mean()) - mean) < 4 * (variance / N) ** 0.5
    assert abs(float(z.var()) - variance) < 4 * variance * (2 / N) ** 0.5


def test_walk_moments():
    """The mean stays and the variance grows by tau per step: N(m_0, sigma_0^2 + T tau), as in the schedule."""
    walk, z_0, z = random_walk(GAUSSIAN, torch.Generator().manual_seed(0))
    assert_moments(z_0, 0.4, 0.49)
    assert_moments(z, 0.4, 0.49 + STEPS * TAU)
    assert GAUSSIAN.moments(walk, 1.0) == pytest.approx((0.4, 0.49 + STEPS * TAU))
    k = torch.arange(STEPS + 1, dtype=torch.float64)
    assert torch.allclose(walk.sigma(k / STEPS) ** 2, k * TAU)
    assert torch.equal(walk.alpha(k / STEPS), torch.ones_like(k))


def test_naive_reverse_adds_variance():
    """Subtracting the same noise returns exactly; subtracting new noise adds another T tau of variance."""
    generator = torch.Generator().manual_seed(1)
    walk, z_0, z_end = random_walk(GAUSSIAN, generator)
    z = z_end
    for _ in range(STEPS):
        z = walk.reverse_step(z, torch.zeros_like(z), -randn(generator))
    assert_moments(z, 0.4, 0.49 + 2 * STEPS * TAU)
    noises = [randn(generator) for _ in range(STEPS)]
    z = z_0
    for w in noises:
        z = walk.forward_step(z, w)
    for w in reversed(noises):
        z = walk.reverse_step(z, torch.zeros_like(z), -w)
    assert torch.allclose(z, z_0, atol=1e-12)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two_modes"])
@pytest.mark.parametrize("stochastic", [True, False])
def test_reverse_with_score_returns_to_the_data(data, stochastic):
    """With the score, the reverse process has the variance of the recursion and the distribution of the data."""
    generator = torch.Generator().manual_seed(2)
    walk, _, z = random_walk(data, generator)
    variance = data.moments(walk, 1.0)[1]
    for k in range(STEPS, 0, -1):
        score = (data.denoise(z, walk(k / STEPS)) - z) / (k * TAU)
        z = walk.reverse_step(z, score, randn(generator) if stochastic else None)
        v = data.moments(walk, k / STEPS)[1]
        variance = (1 - TAU / v) ** 2 * variance + TAU if stochastic else (1 - TAU / (2 * v)) ** 2 * variance
    if data is GAUSSIAN:  # linear: mean and variance follow a recursion
        assert_moments(z, 0.4, variance)
    mean, expected = data.moments(walk, 0.0)
    assert abs(float(z.mean()) - mean) < 0.02 and abs(float(z.var()) - expected) < 0.12 * expected
    levels = data.cdf(walk, 0.0, z).sort().values
    assert (levels - torch.linspace(0, 1, N)).abs().max() < 0.05


def test_ancestral_sampler_equals_the_reverse_walk():
    """ddpm on the walk has the mean of the reverse step and the variance of the posterior."""
    walk, k = make_schedule("walk", steps=STEPS, tau=TAU), 7
    z, w, levels = torch.randn(9, dtype=torch.float64), torch.randn(9), [walk(k / STEPS), walk((k - 1) / STEPS)]
    score = (TWO_MODES.denoise(z, levels[0]) - z) / (k * TAU)
    got = sample(TWO_MODES.denoise, levels, z, "ddpm", lambda: w)
    assert torch.allclose(got, walk.reverse_step(z, score, w * ((k - 1) / k) ** 0.5), atol=1e-10)
    assert time_grid(walk, STEPS)[1] == 1 - 1 / STEPS
