"""A joint model of two correlated Gaussian segments: marginal, conditional and joint sampling differ only in times."""

import pytest
import torch

from sfumato.core import SAMPLERS, Segments, initial_noise, make_schedule, sample, time_grid

DOUBLE = {"dtype": torch.float64}
SEGMENTS = Segments((2, 1))
MEAN = torch.tensor([0.5, -0.3, 0.8], **DOUBLE)
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.7, 0.0], [0.5, -0.7, 0.4]], **DOUBLE)
COVARIANCE = ROOT @ ROOT.T  # of the positions, one number each
COUNT = 512
DETERMINISTIC = [name for name in SAMPLERS if not SAMPLERS[name].stochastic]
STEPS = 120
TOLERANCE = {name: 0.05 if name in ("ddim", "euler") else 0.001 for name in DETERMINISTIC}  # first or second order
EDM_TOLERANCE = 0.015  # added: at t = 1 its data have a share of 1 / 80, which the initial noise leaves out


def denoise(z, level):
    """The exact E[z_0 | z_t] of positions (B, 3, 1), each at its own time (1, 3)."""
    alpha, sigma = level.alpha[0], level.sigma[0]
    covariance = alpha[:, None] * COVARIANCE * alpha + torch.diag(sigma**2)
    gain = torch.linalg.solve(covariance, alpha[:, None] * COVARIANCE)
    return (MEAN + (z[..., 0] - alpha * MEAN) @ gain)[..., None]


def items(positions):
    """Noise for these positions (COUNT, 3, 1) with exactly the moments of N(0, I), and zeros for the others."""
    eps = torch.randn(COUNT, len(positions), generator=torch.Generator().manual_seed(0), **DOUBLE)
    eps = eps - eps.mean(0)
    eps = eps @ torch.linalg.inv(torch.linalg.cholesky(eps.T @ eps / COUNT)).T
    return torch.zeros(COUNT, 3, 1, **DOUBLE).index_copy(1, torch.tensor(positions), eps[..., None])


def moments(z):
    """Mean (N,) and covariance (N, N) of positions (B, N, 1): exact for a sampler that is affine in its start."""
    z = z[..., 0]
    return z.mean(0), torch.cov(z.T, correction=0)


def assert_moments(z, mean, covariance, sampler, name):
    found, tolerance = moments(z), TOLERANCE[sampler] + EDM_TOLERANCE * (name == "edm")
    assert float((found[0] - mean).abs().max()) < tolerance, found
    assert float((found[1] - covariance).abs().max()) < tolerance, found


def run(name, sampler, still, z):
    """Sample from noise z; the segments that `still` maps to a time stay there, those at 0 with the values of z."""
    schedule = make_schedule(name)
    times = time_grid(schedule, STEPS)[:, None, None].repeat(1, 1, 2)
    for segment, t in still.items():
        times[..., segment] = t
    levels = [SEGMENTS.spread(level) for level in schedule.levels(times)]
    held = SEGMENTS.positions([segment for segment, t in still.items() if t == 0])
    start = torch.where(held[:, None], z, initial_noise(levels[0], lambda: z))
    return sample(denoise, levels, start, sampler)


@pytest.mark.parametrize("name", ["flow", "cosine", "edm"])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_joint_sampling_gives_the_joint_covariance(sampler, name):
    z = run(name, sampler, {}, items([0, 1, 2]))
    assert_moments(z, MEAN, COVARIANCE, sampler, name)


@pytest.mark.parametrize("name", ["flow", "cosine", "edm"])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("given", [0, 1])
def test_conditional_sampling_gives_the_conditional_mean_and_covariance(sampler, name, given):
    """A given segment stays at t = 0; the other gets mean m_b + C_ba C_aa^-1 (a - m_a), covariance the complement."""
    a, b = ([0, 1], [2]) if given == 0 else ([2], [0, 1])
    value = torch.tensor([1.4, -1.0, 1.9], **DOUBLE)[a]
    z = items(b)
    z[:, a] = value[:, None]
    z = run(name, sampler, {given: 0.0}, z)
    assert torch.equal(z[:, a, 0], value.expand(COUNT, -1))
    gain = COVARIANCE[b][:, a] @ torch.linalg.inv(COVARIANCE[a][:, a])
    mean, covariance = MEAN[b] + gain @ (value - MEAN[a]), COVARIANCE[b][:, b] - gain @ COVARIANCE[a][:, b]
    assert_moments(z[:, b], mean, covariance, sampler, name)
    assert float((mean - MEAN[b]).abs().max()) > 0.3  # far from the marginal, so errors are visible
    assert float((covariance - COVARIANCE[b][:, b]).abs().max()) > 0.2


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("ignored", [0, 1])
def test_marginal_sampling_gives_the_marginal(sampler, ignored):
    """A segment that stays at t = 1 tells nothing."""
    a = [2] if ignored == 0 else [0, 1]
    z = run("flow", sampler, {ignored: 1.0}, items([0, 1, 2]))
    assert_moments(z[:, a], MEAN[a], COVARIANCE[a][:, a], sampler, "flow")
