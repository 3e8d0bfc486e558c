"""Inpainting against exact posteriors; observed parts stay; all noise has the right variance."""

import pytest
import torch

from sfumato.core import (
    Replace,
    Resample,
    make_schedule,
    reconstruction_guidance,
    sample,
    steps,
    strength_time,
    time_grid,
)
from sfumato.core.inpainting import conjugate_gradients, linearize
from sfumato.core.sampler import SAMPLERS
from sfumato.core.schedule import append_dims_as
from sfumato.errors import UserError
from sfumato.modalities.image.codec import ImageCodec
from tests.core.exact import GAUSSIAN, order

DOUBLE = {"dtype": torch.float64}
A = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), **DOUBLE)  # a linear decoder: 3 numbers to 7
OBSERVED = torch.tensor([True, False, True, False, False, False, False])
STD = 0.3


def decode(z):
    return z @ A.T


def unit(z, level):
    """The denoiser of N(0, I)."""
    return append_dims_as(level.alpha / (level.alpha**2 + level.sigma**2), z) * z


def noise_fn(*shape):
    """A function that draws new noise of this shape on every call."""
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(shape, generator=generator)


def posterior(x):
    """Mean and covariance of z ~ N(0, I), given the observed part of x = decode(z) with noise STD."""
    a = A[OBSERVED]
    covariance = torch.linalg.inv(torch.eye(3, **DOUBLE) + a.T @ a / STD**2)
    return covariance @ a.T @ x[OBSERVED] / STD**2, covariance


@pytest.mark.parametrize("name", ["flow", "cosine", "edm"])
def test_the_posterior_of_a_gaussian_is_exact(name):
    """The sampler is affine in its start: the origin and the unit vectors give mean and covariance exactly."""
    schedule = make_schedule(name)
    x = 3 * torch.randn(7, generator=torch.Generator().manual_seed(1), **DOUBLE)
    mean, covariance = posterior(x)
    noise = schedule(1.0)
    start = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double() * float(torch.hypot(noise.alpha, noise.sigma))
    std = torch.full((4,), STD, **DOUBLE)
    errors = []
    for n in (20, 40):
        denoise = reconstruction_guidance(unit, decode, x.expand(4, 7), OBSERVED, std)
        end = sample(denoise, schedule.levels(time_grid(schedule, n, "logsnr")), start, "heun")
        deviations = end[1:] - end[0]
        errors.append(float((end[0] - mean).norm() + (deviations.T @ deviations - covariance).norm()))
    assert errors[-1] < 0.03 and order((20, 40), errors) > 1.7, errors
    assert (covariance.diagonal() < 0.9).all() and mean.norm() > 0.5  # far from the prior, so errors are visible


def test_without_observations_nothing_changes():
    z, t = torch.randn(5, 3, **DOUBLE), torch.full((5,), 0.4, **DOUBLE)
    level, nothing = make_schedule("flow")(t), torch.zeros(7, dtype=bool)
    unconditional = reconstruction_guidance(unit, decode, torch.zeros(5, 7, **DOUBLE), nothing, t)
    assert torch.equal(unconditional(z, level), unit(z, level))


def test_hidden_values_are_not_used():
    z, x, t = torch.randn(2, 3, **DOUBLE), torch.randn(2, 7, **DOUBLE), torch.full((2,), 0.4, **DOUBLE)
    level, other = make_schedule("flow")(t), torch.where(OBSERVED, x, 100.0)
    z_hat, changed = (reconstruction_guidance(unit, decode, y, OBSERVED, t)(z, level) for y in (x, other))
    assert torch.equal(z_hat, changed) and not torch.allclose(z_hat, unit(z, level), atol=1e-2)


def test_a_nonlinear_decoder_reaches_the_observation():
    """Each evaluation takes one linear step; along the grid D(z) converges to x."""
    schedule = make_schedule("flow")
    curved = lambda z: torch.tanh(z @ A.T.float())
    x = curved(torch.tensor([[0.5, -0.3, 0.8]])).expand(6, 7)
    noise = noise_fn(6, 3)
    denoise = reconstruction_guidance(unit, curved, x, OBSERVED, torch.full((6,), 0.02))
    z = sample(denoise, schedule.levels(time_grid(schedule, 40)), noise(), "ddpm", noise)
    assert (curved(z) - x)[:, OBSERVED].abs().max() < 0.05
    assert (curved(z) - x)[:, ~OBSERVED].abs().mean() > 0.1  # free where nothing is observed


def test_observed_positions_hold_noisy_data_and_end_unchanged():
    schedule = make_schedule("flow")
    z, observed = torch.linspace(-1, 1, 4), torch.tensor([True, False, True, False])
    noise = noise_fn(2000, 4)
    step = Replace(SAMPLERS["ddpm"], z.expand(2000, 4), observed)
    grid = time_grid(schedule, 4)
    *path, end = (taken.z for taken in steps(GAUSSIAN.denoise, schedule.levels(grid), noise(), step, noise))
    for s, z_s in zip(grid[1:-1].tolist(), path, strict=True):
        assert ((z_s.mean(0) - (1 - s) * z)[observed].abs() < 4 * s / 2000**0.5).all()
        assert torch.allclose(z_s.std(0)[observed], torch.tensor(s), rtol=0.08)
    assert torch.equal(end[:, observed], z[observed].expand(2000, 2))
    assert end[:, ~observed].std(0).min() > 0.3


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_resampling_keeps_the_marginal(name):
    """N(m, s^2) keeps its marginal at time t for any number of repeats: the added noise has the right variance."""
    schedule = make_schedule(name)
    levels = schedule.levels(time_grid(schedule, 40, "uniform", 0.7, 0.35))
    mean, variance = GAUSSIAN.moments(schedule, 0.7)
    noise = noise_fn(4000, 1)
    start = mean + variance**0.5 * noise()
    for repeats in (1, 3):
        z = sample(GAUSSIAN.denoise, levels, start, Resample(SAMPLERS["ddpm"], repeats), noise)
        mean_s, variance_s = GAUSSIAN.moments(schedule, 0.35)
        assert abs(float(z.mean()) - mean_s) < 0.08 * variance_s**0.5
        assert abs(float(z.var()) / variance_s - 1) < 0.1


def correlated(covariance):
    """The denoiser of N(0, covariance), for scalar levels."""

    def denoise(z, level):
        alpha, sigma = float(level.alpha), float(level.sigma)
        return alpha * z @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(len(covariance))) @ covariance

    return denoise


def test_resampling_carries_information_from_observed_to_new_positions():
    """Two correlated numbers, one observed: E[z_2 | z_1] = c z_1, reached only with repeats."""
    schedule, c = make_schedule("flow"), 0.95
    errors = []
    for repeats in (1, 8):
        noise = noise_fn(2000, 2)
        step = Resample(Replace(SAMPLERS["ddpm"], torch.full((2000, 2), 1.5), torch.tensor([True, False])), repeats)
        denoise = correlated(torch.tensor([[1.0, c], [c, 1.0]]))
        z = sample(denoise, schedule.levels(time_grid(schedule, 16)), noise(), step, noise)
        errors.append(abs(float(z[:, 1].mean()) - 1.5 * c))
    assert errors[1] < errors[0] / 2 and errors[1] < 0.25, errors


def test_posterior_mean_uses_partly_observed_positions_that_replace_cannot():
    """Both find the posterior mean if a whole position is hidden, only `reconstruction_guidance` if half of one is."""
    schedule = make_schedule("flow")
    levels = schedule.levels(time_grid(schedule, 16))
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    covariance = torch.corrcoef(root + 1.0)
    decoder = torch.kron(torch.eye(4), torch.ones(2, 1)) + 0.1  # a latent element is two pixels, with some leakage
    z = torch.linalg.cholesky(covariance + 1e-4 * torch.eye(4)) @ torch.tensor([1.2, -0.7, 0.9, 0.5])
    unconditional = correlated(covariance)
    errors = []
    for visible in (torch.arange(8) < 6, torch.arange(8) < 7):
        a = decoder[visible]
        exact = covariance @ a.T @ torch.linalg.solve(a @ covariance @ a.T + 0.01 * torch.eye(len(a)), a @ z)
        noise = noise_fn(2000, 4)
        x, std = (decoder @ z).expand(2000, 8), torch.full((2000,), 0.1)
        guided = reconstruction_guidance(unconditional, lambda z: z @ decoder.T, x, visible, std)
        observed = Replace(SAMPLERS["ddpm"], z.expand(2000, 4), torch.arange(4) < 3)
        means = [
            sample(denoise, levels, noise(), Resample(step, 3), noise).mean(0)
            for denoise, step in ((guided, SAMPLERS["ddpm"]), (unconditional, observed))
        ]
        errors.append([float((mean - exact).norm()) for mean in means])
    whole, half = errors
    assert max(whole) < 0.15 and half[0] < 0.15 and half[0] < half[1] / 2, errors


def test_missing_noise_is_an_error():
    schedule, z = make_schedule("flow"), torch.zeros(2, 1)
    for step in (Replace(SAMPLERS["ddim"], z, z == 0), Resample(SAMPLERS["ddim"], 2)):
        with pytest.raises(ValueError, match="needs `noise`"):
            sample(GAUSSIAN.denoise, schedule.levels(time_grid(schedule, 2)), z, step)


def test_the_jacobian_of_a_codec_equals_finite_differences():
    """The codec has group norm in channels-last memory, where forward mode fails."""
    torch.manual_seed(0)
    codec = ImageCodec((3, 8, 8), downsample=4, width=16).double().eval().requires_grad_(False)
    for weight in codec.parameters():
        weight.add_(torch.randn(weight.shape, **DOUBLE), alpha=0.1)
    z, v = torch.randn(2, 2, *codec.latent_shape, **DOUBLE)
    decode_fn = lambda z: codec.decoder(z)
    with torch.no_grad():
        value, jvp, vjp = linearize(decode_fn, z)
        slope = (decode_fn(z + 1e-5 * v) - decode_fn(z - 1e-5 * v)) / 2e-5
        u = torch.randn(value.shape, **DOUBLE)
    assert torch.equal(value, decode_fn(z)) and not value.requires_grad
    assert torch.allclose(jvp(v), slope, atol=1e-7) and slope.abs().mean() > 0.1
    assert torch.allclose((jvp(v) * u).sum(), (vjp(u) * v).sum())


def test_conjugate_gradients_converge_within_the_dimension():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 6, generator=generator, **DOUBLE)
    matrix = root @ root.mT + torch.eye(6, **DOUBLE)
    b = torch.randn(3, 2, 3, generator=generator, **DOUBLE)
    operator = lambda v: (matrix @ v.flatten(1)[..., None]).reshape(v.shape)
    x = conjugate_gradients(operator, b, 6)
    assert torch.allclose(operator(x), b, atol=1e-7)
    assert not torch.allclose(operator(conjugate_gradients(operator, b, 3)), b, atol=1e-3)
    assert torch.equal(conjugate_gradients(operator, 0 * b, 6), 0 * b)


@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm"])
def test_strength_is_the_fraction_of_noise(name):
    schedule = make_schedule(name)
    for strength in (0.2, 0.6, 0.9):
        level = schedule(strength_time(schedule, strength))
        assert abs(float(level.sigma / (level.alpha + level.sigma)) - strength) < 1e-6
    assert (strength_time(schedule, 0), strength_time(schedule, 1)) == (0.0, 1.0)
    assert abs(strength_time(make_schedule("flow"), 0.6) - 0.6) < 1e-12
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            strength_time(schedule, wrong)
