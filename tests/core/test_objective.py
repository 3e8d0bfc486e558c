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
from sfumato.core.objective import masked_mean

FLOW = make_schedule("flow")


class Oracle(nn.Module):
    """A network whose output gives a given z_hat, for every prediction."""

    def __init__(self, z_hat, z_t, t):
        super().__init__()
        self.arguments = z_hat, z_t, t
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z_in, clocks, cond, mask):
        z_hat, z_t, t = self.arguments
        c_skip, c_out = self.denoiser[0].coefficients(t, z_t.ndim)
        return ((z_hat - c_skip * z_t) / c_out).to(z_in) * self.scale


def oracle(predict, z, z_hat, t, eps, schedule=FLOW):
    denoiser = Denoiser(nn.Identity(), schedule, predict)
    net = Oracle(z_hat, denoiser.add_noise(z, eps, t), t)
    net.denoiser = [denoiser]  # in a list, so that it is not its own submodule
    denoiser.net = net
    return denoiser


def example(shape=(6, 4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, z_hat, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return z, z_hat, eps, torch.linspace(0.05, 0.95, shape[0], dtype=torch.float64)


@pytest.mark.parametrize("weight", [name for name in LOSS_WEIGHTS if name != "learned"])
@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", ["flow", "cosine", "edm"])
def test_weight_is_on_z_hat(weight, predict, name):
    z, z_hat, eps, t = example()
    schedule = make_schedule(name)
    objective = Objective(weight)
    loss = objective.loss(oracle(predict, z, z_hat, t, eps, schedule), z, None, None, t, eps)
    expected = make_weight(weight)(schedule.logsnr(t)) * (z_hat - z).square().flatten(1).mean(1)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_uniform_is_plain_flow_matching():
    z, z_hat, eps, t = example()
    denoiser = oracle("flow", z, z_hat, t, eps)
    z_t = denoiser.add_noise(z, eps, t)
    plain = (denoiser.network_output(z_t, t) - (eps - z)).square().flatten(1).mean(1)
    assert torch.allclose(Objective().loss(denoiser, z, None, None, t, eps), plain)


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
@pytest.mark.parametrize("name", ["flow", "cosine", "linear", "edm", "walk"])
def test_finite_at_the_ends(weight, name):
    t = torch.tensor([0.0, 1e-9, 1.0], dtype=torch.float64)
    denoiser = Denoiser(_Zero(), make_schedule(name))
    z, eps = torch.randn(2, 3, 4)
    assert Objective(weight).loss(denoiser, z, None, None, t, eps).isfinite().all()


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
        ("lognormal", {"mean": 0.2, "std": 1.1}, lambda t: normal_cdf((-FLOW.logsnr(t) / 2 - 0.2) / 1.1)),
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
        log_sigma = -schedule.logsnr(sample_times("lognormal", schedule)) / 2
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
    z, z_hat, eps, t = example((32, 4))
    objective = Objective(times=make_time_sampling("adaptive", bins=2))
    plain = objective.loss(oracle("flow", z, z_hat, t, eps), z, None, None, t, eps)
    objective.update_with_losses(t, 1 + 9.0 * (t > 0.5))
    loss = objective.loss(oracle("flow", z, z_hat, t, eps), z, None, None, t, eps)
    assert torch.allclose(loss, plain * objective.times.importance_weight(t))
    assert objective.times.density()[1] > objective.times.density()[0]


def test_learned_uncertainty():
    """It starts without effect, its parameters learn, and the optimal u is the log of the loss at that time."""
    z, z_hat, eps, _ = (x.float() if x.ndim > 1 else x for x in example((64, 4, 3)))
    t = torch.linspace(0.3, 0.95, 64, dtype=torch.float64)
    objective, denoiser = Objective("learned"), oracle("flow", z, z_hat, t, eps)
    plain = Objective("uniform").loss(denoiser, z, None, None, t, eps).detach()
    assert torch.allclose(objective.loss(denoiser, z, None, None, t, eps), plain)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        objective.loss(denoiser, z, None, None, t, eps).mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())
    u = objective.weight.uncertainty(FLOW.logsnr(t)).detach()
    assert float((u - plain.log()).abs().mean()) < 0.5  # single losses vary around their mean
    assert float((torch.exp(-u) * plain).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("layout", ["channels_first", "tokens", "vector"])
def test_masked_positions_do_not_count(layout):
    """Values at padding change neither the loss nor a gradient."""
    shape = {"channels_first": (2, 3, 5), "tokens": (2, 5, 3), "vector": (2, 5)}[layout]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    value = torch.rand(shape, requires_grad=True)
    mean = masked_mean(value, mask)
    kept = value[0, :, :3] if layout == "channels_first" else value[0, :3]
    assert mean.shape == (2,)
    assert torch.allclose(mean, torch.stack([kept.mean(), value[1].mean()]))
    mean.sum().backward()
    dropped = value.grad[0, :, 3:] if layout == "channels_first" else value.grad[0, 3:]
    assert (dropped == 0).all()
    assert torch.allclose(masked_mean(value, torch.ones_like(mask)), masked_mean(value))


def test_mask_within_the_loss():
    z, z_hat, eps, t = example((6, 3, 5))
    mask = torch.rand(6, 5) > 0.4
    mask[:, 0] = True
    objective = Objective()
    loss = objective.loss(oracle("flow", z, z_hat, t, eps), z, None, mask, t, eps)
    changed = torch.where(mask[:, None], z_hat, 1e3)
    assert torch.allclose(loss, objective.loss(oracle("flow", z, changed, t, eps), z, None, mask, t, eps))


def test_distance_is_replaceable():
    z, z_hat, eps, t = example()
    objective = Objective("edm", distance=lambda a, b: (a - b).abs())
    loss = objective.loss(oracle("v", z, z_hat, t, eps), z, None, None, t, eps)
    expected = make_weight("edm")(FLOW.logsnr(t)) * (z_hat - z).abs().flatten(1).mean(1)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_times_of_each_token():
    z, z_hat, eps, _ = example((6, 4, 3))
    t = torch.rand(6, 4, dtype=torch.float64) * 0.9 + 0.05
    loss = Objective("edm").loss(oracle("flow", z, z_hat, t, eps), z, None, None, t, eps)
    weight = make_weight("edm")(FLOW.logsnr(t))
    assert torch.allclose(loss.double(), (weight * (z_hat - z).square().mean(2)).mean(1), rtol=1e-5)


def test_every_name_is_tested_and_errors_suggest_the_nearest():
    assert set(TIME_SAMPLINGS) == {"uniform", "logit_normal", "lognormal", "adaptive"}
    assert set(LOSS_WEIGHTS) == {"uniform", "edm", "min_snr", "sigmoid", "learned"}
    with pytest.raises(ValueError, match="did you mean 'min_snr'"):
        Objective("minsnr")
    with pytest.raises(ValueError, match="did you mean 'gamma'"):
        make_weight("min_snr", gama=3)
    with pytest.raises(ValueError, match="did you mean 'lognormal'"):
        Objective(times="log_normal_")
