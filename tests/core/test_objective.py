"""The objective: a weight means the same for every prediction, times have their density, masks are respected."""

import math

import pytest
import torch
from torch import nn

from sfumato.core import (
    LOSS_WEIGHTS,
    PREDICTIONS,
    TIME_SAMPLINGS,
    Denoiser,
    Objective,
    make_schedule,
    make_time_sampling,
    make_weight,
    step_generator,
)
from sfumato.core.denoiser import ContinuousPrediction
from sfumato.core.schedule import Segments, append_dims, masked_mean
from sfumato.types import Latent

FLOW = make_schedule("flow")


class Fixed(nn.Module):
    """A network with a given output."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, z_in, clocks, cond, mask):
        return self.output


def oracle(predict, z, z_hat, level, eps, segments=()):
    """A denoiser whose network's output gives a given z_hat, for every prediction."""
    at_positions = Segments(segments).spread(level)
    z_t, c = at_positions.add_noise(z, eps), PREDICTIONS[predict](at_positions.alpha, at_positions.sigma)
    f = (z_hat - append_dims(c.c_skip, z_t) * z_t) / append_dims(c.c_out, z_t)
    return Denoiser(Fixed(f.to(z)), FLOW, predict, segments)


def example(shape=(6, 4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, z_hat, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return z, z_hat, eps, FLOW(torch.linspace(0.05, 0.95, shape[0], dtype=torch.float64))


@pytest.mark.parametrize("weight", [name for name in LOSS_WEIGHTS if name != "learned"])
@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", ["flow", "cosine", "edm"])
def test_weight_is_on_z_hat(weight, predict, name):
    z, z_hat, eps, level = example()
    level = make_schedule(name)(level.t)
    loss = Objective(weight).loss(oracle(predict, z, z_hat, level, eps), Latent(z), None, level, eps)
    expected = make_weight(weight)(level.logsnr) * (z_hat - z).square().flatten(1).mean(1)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_uniform_is_plain_flow_matching():
    z, z_hat, eps, level = example()
    denoiser = oracle("flow", z, z_hat, level, eps)
    plain = (denoiser.network_output(level.add_noise(z, eps), level) - (eps - z)).square().flatten(1).mean(1)
    assert torch.allclose(Objective().loss(denoiser, Latent(z), None, level, eps), plain)


def test_edm_weight_is_one_on_v():
    sigma = torch.tensor([0.01, 0.5, 1.0, 30.0], dtype=torch.float64)
    assert torch.allclose(make_weight("edm")(-2 * sigma.log()), (sigma**2 + 1) / sigma**2)


def test_min_snr():
    logsnr = torch.tensor([-2.0, 0.0, math.log(5), 4.0], dtype=torch.float64)
    weight = make_weight("min_snr", gamma=5.0)(logsnr)
    assert torch.allclose(weight, torch.tensor([math.exp(-2), 1, 5, 5], dtype=torch.float64))
    snr = logsnr.exp()
    on_eps = weight * torch.exp(-logsnr)  # the error of eps is alpha / sigma times that of z
    assert torch.allclose(on_eps, torch.minimum(snr, torch.tensor(5.0)) / snr)


def test_sigmoid():
    logsnr = torch.linspace(-8, 8, 9, dtype=torch.float64)
    on_eps = make_weight("sigmoid", bias=1.0)(logsnr) * torch.exp(-logsnr)
    assert torch.allclose(on_eps, torch.sigmoid(1 - logsnr))


@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm", "walk"])
def test_finite_at_the_ends(weight, predict, name):
    level = make_schedule(name)(torch.tensor([0.0, 1e-9, 1.0], dtype=torch.float64))
    denoiser = Denoiser(_Zero(), make_schedule(name), predict)
    z, eps = torch.randn(2, 3, 4)
    assert Objective(weight).loss(denoiser, Latent(z), None, level, eps).isfinite().all()


class _Zero(nn.Module):
    def forward(self, z_in, clocks, cond, mask):
        return torch.zeros_like(z_in)


def sample_times(name, schedule=FLOW, **settings):
    objective = Objective(times=make_time_sampling(name, **settings))
    return objective.sample_times(schedule, (20_000,), step_generator(0, "test", 0))


def normal_cdf(x):
    return torch.special.ndtr(x)


@pytest.mark.parametrize(
    ("name", "settings", "cdf"),
    [
        ("uniform", {}, lambda t: t),
        ("logit_normal", {"mean": -0.3, "std": 0.8}, lambda t: normal_cdf((torch.logit(t) + 0.3) / 0.8)),
        ("lognormal", {"mean": 0.2, "std": 1.1}, lambda t: normal_cdf((-FLOW(t).logsnr / 2 - 0.2) / 1.1)),
        ("adaptive", {}, lambda t: t),
    ],
)
def test_density_of_times(name, settings, cdf):
    t = sample_times(name, **settings)
    assert t.shape == (20_000,) and t.dtype == torch.float64 and t.min() >= 0 and t.max() <= 1
    levels = cdf(t.sort().values)
    assert (levels - torch.linspace(0, 1, 20_000, dtype=torch.float64)).abs().max() < 1e-3


def test_lognormal_for_any_schedule():
    for name in ("cosine", "edm"):
        schedule = make_schedule(name)
        log_sigma = -schedule(sample_times("lognormal", schedule)).logsnr / 2
        assert float(log_sigma.mean()) == pytest.approx(-0.5, abs=0.01)
        assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.01)


def test_times_are_addressed_stratified_and_shuffled():
    draw_times = lambda step, shape: Objective().sample_times(FLOW, shape, step_generator(3, "diffusion", step))
    assert torch.equal(draw_times(5, (64,)), draw_times(5, (64,))) and not torch.equal(
        draw_times(5, (64,)), draw_times(6, (64,))
    )
    t = draw_times(5, (64, 2))
    bins = (t * 64).long().sort(0).values
    assert torch.equal(bins, torch.arange(64)[:, None].expand(64, 2))  # one in every 64th
    assert not torch.equal(t[:, 0].argsort(), t[:, 1].argsort())
    assert t[:, 0].diff().abs().mean() > 0.2


def test_adaptive_times_learn_and_stay_unbiased():
    """Times concentrate where the loss is large; the importance weight keeps the mean over t."""
    times = make_time_sampling("adaptive", bins=8)
    loss_at = lambda t: 0.1 + 3 * (t > 0.75)
    for step in range(60):
        t = Objective(times=times).sample_times(FLOW, (64,), step_generator(0, "a", step))
        times.update_with_losses(t, loss_at(t) * times.importance_weight(t))
    t = Objective(times=times).sample_times(FLOW, (4000,), step_generator(0, "b", 0))
    fraction = float((t > 0.75).double().mean())
    root = torch.tensor([0.1] * 6 + [3.1] * 2, dtype=torch.float64)
    density = 0.1 + 0.9 * root / root.mean()
    assert fraction == pytest.approx(float(density[6:].sum() / 8), abs=0.01)
    assert torch.allclose(times.density(), density, rtol=1e-4)
    assert float((loss_at(t) * times.importance_weight(t)).mean()) == pytest.approx(0.1 + 3 / 4, rel=0.01)
    again = make_time_sampling("adaptive", bins=8)
    again.load_state_dict(times.state_dict())
    assert torch.equal(again.density(), times.density())


def test_adaptive_within_the_loss():
    z, z_hat, eps, level = example((32, 4))
    objective, denoiser = Objective(times=make_time_sampling("adaptive", bins=2)), oracle("flow", z, z_hat, level, eps)
    plain = objective.loss(denoiser, Latent(z), None, level, eps)
    objective.update_with_losses(level.t, 1 + 9.0 * (level.t > 0.5))
    loss = objective.loss(denoiser, Latent(z), None, level, eps)
    assert torch.allclose(loss, plain * objective.times.importance_weight(level.t))
    assert objective.times.density()[1] > objective.times.density()[0]


def test_learned_uncertainty():
    """It starts without effect, its parameters learn, and the optimal u is the log of the loss at that time."""
    z, z_hat, eps = (x.float() for x in example((64, 4, 3))[:3])
    level = FLOW(torch.linspace(0.3, 0.95, 64, dtype=torch.float64))
    objective, denoiser = Objective("learned"), oracle("flow", z, z_hat, level, eps)
    plain = Objective("uniform").loss(denoiser, Latent(z), None, level, eps).detach()
    assert torch.allclose(objective.loss(denoiser, Latent(z), None, level, eps), plain)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        objective.loss(denoiser, Latent(z), None, level, eps).mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())
    u = objective.weight.uncertainty(level.logsnr).detach()
    assert float((u - plain.log()).abs().mean()) < 0.5  # single losses vary around their mean
    assert float((torch.exp(-u) * plain).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("width", [3, 5, 1], ids=["narrow", "as_wide_as_long", "one"])
def test_masked_positions_do_not_count(width):
    """Values at padding change neither the loss nor a gradient."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    value = torch.rand(2, 5, width, requires_grad=True)
    mean = masked_mean(value, mask)
    assert mean.shape == (2,)
    assert torch.allclose(mean, torch.stack([value[0, :3].mean(), value[1].mean()]))
    mean.sum().backward()
    assert (value.grad[0, 3:] == 0).all() and (value.grad[0, :3] != 0).all()
    assert torch.allclose(masked_mean(value, torch.ones_like(mask)), masked_mean(value))


@pytest.mark.parametrize("width", [3, 5], ids=["narrow", "as_wide_as_long"])
def test_mask_within_the_loss(width):
    z, z_hat, eps, level = example((6, 5, width))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[:, 0] = True
    latent, denoiser, objective = Latent(z, mask), oracle("flow", z, z_hat, level, eps), Objective()
    loss = objective.loss(denoiser, latent, None, level, eps)
    changed = torch.where(mask[..., None], z_hat, 1e3)
    assert torch.allclose(loss, objective.loss(oracle("flow", z, changed, level, eps), latent, None, level, eps))
    assert (loss > 0).all() and not torch.allclose(loss, objective.loss(denoiser, Latent(z), None, level, eps))


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_an_error_at_masked_positions_only_gives_no_loss(predict):
    """Tokens as wide as long: a mask on the axis of the channels would keep part of the error."""
    z, _, eps, level = example((6, 5, 5))
    mask = torch.arange(5) < torch.tensor([1, 2, 3, 4, 5, 3])[:, None]
    c = PREDICTIONS[predict](level.alpha, level.sigma)
    target = append_dims(c.target_z, z) * z + append_dims(c.target_eps, z) * eps
    f = torch.where(mask[..., None], target, target + 1e3)
    loss = Objective().loss(Denoiser(Fixed(f), FLOW, predict), Latent(z, mask), None, level, eps)
    assert torch.equal(loss, torch.zeros(6, dtype=torch.float64))
    by_channel = (f - target).square().mean(1)  # (B, D)
    assert (torch.where(mask, by_channel, 0).sum(1) > 0).tolist() == (mask.sum(1) < 5).tolist()


def test_a_prediction_of_its_own_decides_the_loss():
    class Absolute(ContinuousPrediction):
        def loss(self, f, z, eps, z_t, level, weight=1.0):
            return append_dims(weight, z) * (self.expectation(f, z_t, level) - z).abs()

    z, z_hat, eps, level = example()
    denoiser = oracle("v", z, z_hat, level, eps)
    denoiser.prediction = Absolute("v")
    loss = Objective("edm").loss(denoiser, Latent(z), None, level, eps)
    expected = make_weight("edm")(level.logsnr) * (z_hat - z).abs().flatten(1).mean(1)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_times_of_each_token():
    z, z_hat, eps, _ = example((6, 4, 3))
    level = FLOW(torch.rand(6, 4, dtype=torch.float64) * 0.9 + 0.05)
    loss = Objective("edm").loss(oracle("flow", z, z_hat, level, eps), Latent(z), None, level, eps)
    weight = make_weight("edm")(level.logsnr)
    assert torch.allclose(loss.double(), (weight * (z_hat - z).square().mean(2)).mean(1), rtol=1e-5)


SEGMENTS = (2, 3)
PARTS = slice(0, 2), slice(2, 5)  # positions of both segments


def segment_example(width=5):
    """Latents of two segments with a time for each, and a mask; as wide as long."""
    z, z_hat, eps, _ = example((4, 5, width))
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64).reshape(4, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    return Latent(z, mask), z_hat, eps, FLOW(t)


@pytest.mark.parametrize("width", [3, 5], ids=["narrow", "as_wide_as_long"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_loss_of_each_segment(predict, masked, width):
    """Each segment has the weight of its own time, and the mean over its own tokens."""
    latent, z_hat, eps, level = segment_example(width)
    latent = latent if masked else Latent(latent.z)
    denoiser = oracle(predict, latent.z, z_hat, level, eps, SEGMENTS)
    loss = Objective("edm").loss(denoiser, latent, None, level, eps).detach()
    assert loss.shape == (4, 2)
    error, weight = (z_hat - latent.z).square(), make_weight("edm")(level.logsnr)
    for i in range(4):
        for s, part in enumerate(PARTS):
            kept = error[i, part][latent.mask[i, part]] if masked else error[i, part]
            assert float(loss[i, s]) == pytest.approx(float(weight[i, s] * kept.mean()), rel=1e-6)


def test_a_segment_without_tokens_has_no_loss():
    latent, z_hat, eps, level = segment_example()
    mask = latent.mask.clone()
    mask[1, PARTS[0]] = False
    denoiser = oracle("flow", latent.z, z_hat, level, eps, SEGMENTS)
    loss = Objective().loss(denoiser, Latent(latent.z, mask), None, level, eps)
    empty = torch.zeros(4, 2, dtype=torch.bool)
    empty[1, 0] = True
    assert (loss[empty] == 0).all() and (loss[~empty] > 0).all() and loss.isfinite().all()


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_gradient_of_each_loss_term(predict):
    r"""$2 w c_{out}^2 (F - target) / n$ at the n elements of a segment's tokens, 0 elsewhere."""
    latent, z_hat, eps, level = segment_example()
    denoiser = oracle(predict, latent.z, z_hat, level, eps, SEGMENTS)
    loss, f = Objective("edm").loss(denoiser, latent, None, level, eps), denoiser.net.output
    c, weight = PREDICTIONS[predict](level.alpha, level.sigma), make_weight("edm")(level.logsnr)
    for i in range(4):
        for s, part in enumerate(PARTS):
            target = c.target_z[i, s] * latent.z[i, part] + c.target_eps[i, s] * eps[i, part]
            mask = latent.mask[i, part, None]
            expected = torch.zeros_like(f)
            expected[i, part] = 2 * weight[i, s] * c.c_out[i, s] ** 2 * (f[i, part] - target) * mask / (5 * mask.sum())
            (gradient,) = torch.autograd.grad(loss[i, s], f, retain_graph=True)
            assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12) and gradient.any()


def test_gradient_of_the_learned_uncertainty():
    r"""The loss is $e^{-u} l + u$: its gradient is $e^{-u} dl/dF$ and, for u, $1 - e^{-u} l$."""
    latent, z_hat, eps, level = segment_example()
    objective, denoiser = Objective("learned").double(), oracle("flow", latent.z, z_hat, level, eps, SEGMENTS)
    bias, f = nn.init.constant_(objective.weight.out.bias, 0.3), denoiser.net.output
    plain = Objective("uniform").loss(denoiser, latent, None, level, eps)
    loss = objective.loss(denoiser, latent, None, level, eps)
    assert torch.allclose(loss, math.exp(-0.3) * plain + 0.3, rtol=1e-9)
    for term, without in zip(loss.flatten(), plain.flatten(), strict=True):
        of_f, of_u = torch.autograd.grad(term, [f, bias], retain_graph=True)
        (of_plain,) = torch.autograd.grad(without, f, retain_graph=True)
        assert torch.allclose(of_f, math.exp(-0.3) * of_plain, rtol=1e-9) and of_plain.any()
        assert float(of_u) == pytest.approx(1 - math.exp(-0.3) * float(without.detach()), rel=1e-9)


def test_adaptive_times_of_each_segment():
    """Every segment's loss gets the importance weight of its own time, and is recorded there."""
    latent, z_hat, eps, level = segment_example()
    objective = Objective(times=make_time_sampling("adaptive", bins=2))
    denoiser = oracle("flow", latent.z, z_hat, level, eps, SEGMENTS)
    plain = objective.loss(denoiser, latent, None, level, eps)
    objective.update_with_losses(level.t, 1 + 9.0 * (level.t > 0.5))
    loss = objective.loss(denoiser, latent, None, level, eps)
    assert torch.allclose(loss, plain * objective.times.importance_weight(level.t))
    assert objective.times.density()[1] > objective.times.density()[0]


def test_latents_of_the_cache_may_be_bfloat16():
    z, _, eps, level = example()
    z, eps = z.bfloat16(), eps.float()
    loss = Objective().loss(Denoiser(_Zero(), FLOW), Latent(z), None, level, eps)
    assert loss.dtype == torch.float32 and torch.allclose(loss, (eps - z.float()).square().flatten(1).mean(1))


def test_every_name_is_tested_and_errors_suggest_the_nearest():
    assert set(TIME_SAMPLINGS) == {"uniform", "logit_normal", "lognormal", "adaptive"}
    assert set(LOSS_WEIGHTS) == {"uniform", "edm", "min_snr", "sigmoid", "learned"}
    with pytest.raises(ValueError, match="did you mean 'min_snr'"):
        Objective("minsnr")
    with pytest.raises(ValueError, match="did you mean 'gamma'"):
        make_weight("min_snr", gama=3)
    with pytest.raises(ValueError, match="did you mean 'lognormal'"):
        Objective(times="log_normal_")
