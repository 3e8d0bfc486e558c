"""Categorical denoising: exact posterior for independent columns, and what a network adds to it."""

import torch
from torch import Tensor, nn

from sfumato.core import Denoiser, Objective, make_prediction, make_schedule, sample, time_grid
from sfumato.core.categorical import log_softmax
from sfumato.core.schedule import NoiseLevel
from sfumato.types import CategoricalLayout, Latent

FREQUENCIES = [[0.7, 0.2, 0.1], [0.5, 0.5]]
WIDTHS = (3, 2)


def layout(start: int = 1) -> CategoricalLayout:
    """One number, then two groups of 3 and 2 levels."""
    p = [torch.tensor(frequencies) for frequencies in FREQUENCIES]
    s = [(q * (1 - q)).mean().sqrt().expand_as(q) for q in p]
    return CategoricalLayout(start, WIDTHS, torch.cat(p), torch.cat(s))


def sample_rows(count: int, g: torch.Generator) -> Tensor:
    """Rows z (N, 6) with independent columns of these frequencies."""
    levels = [torch.multinomial(torch.tensor(frequencies), count, True, generator=g) for frequencies in FREQUENCIES]
    e = torch.cat([nn.functional.one_hot(k, width) for k, width in zip(levels, WIDTHS, strict=True)], 1)
    return torch.cat([torch.randn(count, 1, generator=g), (e - layout().mean) / layout().std], 1)


class Constant(nn.Module):
    """A network with a constant output."""

    def __init__(self, f: Tensor) -> None:
        super().__init__()
        self.f = nn.Parameter(f)

    def forward(self, z: Tensor, clocks: Tensor, cond: object = None, mask: object = None) -> Tensor:
        return self.f.expand_as(z)


def denoiser(f: Tensor | None = None) -> Denoiser:
    net = Constant(torch.zeros(6) if f is None else f)
    return Denoiser(net, make_schedule("flow"), make_prediction("v", layout()))


def level(t: float, count: int) -> NoiseLevel:
    """The level of a batch at one time."""
    return make_schedule("flow")(torch.full((count,), t, dtype=torch.float64))


def test_log_softmax_is_separate_in_each_group():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([part.log_softmax(1) for part in logits.split(WIDTHS, 1)], 1)
    torch.testing.assert_close(log_softmax(logits, WIDTHS), expected)


def test_zero_output_gives_the_bayes_posterior_of_independent_columns():
    g = torch.Generator().manual_seed(0)
    z, at_t = sample_rows(50, g), level(0.6, 50)
    z_t = at_t.add_noise(z, torch.randn(50, 6, generator=g))
    start, found = 1, denoiser()(z_t, at_t)
    for frequencies, width in zip(FREQUENCIES, WIDTHS, strict=True):
        cut = slice(start, start + width)
        p = torch.tensor(frequencies)
        codes = (torch.eye(width) - p) / (p * (1 - p)).mean().sqrt()  # (L, L): z of each level
        distance = (z_t[:, None, cut] - 0.4 * codes).square().sum(2) / (2 * 0.6**2)
        torch.testing.assert_close(found[:, cut], (p.log() - distance).softmax(1) @ codes)
        start += width


def test_network_input_is_the_posterior_mean_of_each_column_alone():
    """That equals the output of an untrained network; numeric positions get scaled z_t."""
    inputs: list[Tensor] = []

    class Recording(Constant):
        def forward(self, z: Tensor, clocks: Tensor, cond: object = None, mask: object = None) -> Tensor:
            inputs.append(z)
            return super().forward(z, clocks)

    g = torch.Generator().manual_seed(1)
    z, at_t = sample_rows(20, g), level(0.4, 20)
    model = Denoiser(Recording(torch.zeros(6)), make_schedule("flow"), make_prediction("v", layout()))
    z_t = at_t.add_noise(z, torch.randn(20, 6, generator=g))
    alone = model(z_t, at_t)
    torch.testing.assert_close(inputs[0][:, 1:], alone[:, 1:])
    torch.testing.assert_close(inputs[0][:, 0], z_t[:, 0] / (0.4**2 + 0.6**2) ** 0.5)


def test_numeric_positions_are_denoised_as_without_a_layout():
    z_t, at_t = torch.randn(3, 6), level(0.5, 3)
    plain = Denoiser(denoiser().net, make_schedule("flow"), "v")
    torch.testing.assert_close(denoiser()(z_t, at_t)[:, :1], plain(z_t, at_t)[:, :1])


def test_loss_is_twice_the_cross_entropy_and_learns_the_frequencies():
    """The network's output corrects a wrong prior; then the loss is that of the true frequencies."""
    g, wrong = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(6))
    model = denoiser(wrong.data + torch.tensor([0.0, -1.0, 2.0, 0.0, 1.0, 0.0]))
    objective = Objective("edm", "uniform")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(150):
        z = sample_rows(256, g)
        at_t = model.schedule(objective.sample_times(model.schedule, (256,), g))
        loss = objective.loss(model, Latent(z), None, at_t, torch.randn(z.shape, generator=g)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    f = model.net.f.detach()
    assert (f[1:4] - f[1:4].mean()).abs().max() < 0.3 and (f[4:] - f[4:].mean()).abs().max() < 0.3
    at_t = level(1.0 - 1e-6, 4000)  # pure noise: the loss is the entropy
    z = sample_rows(4000, g)
    loss = objective.loss(denoiser(), Latent(z), None, at_t, torch.randn(z.shape, generator=g)).mean()
    entropy = sum(float(torch.special.entr(torch.tensor(frequencies)).sum()) for frequencies in FREQUENCIES)
    torch.testing.assert_close(float(loss.detach()) * 6, 1 + 2 * entropy, rtol=0.05, atol=0)


def test_samples_are_one_hot_with_the_right_frequencies():
    g = torch.Generator().manual_seed(0)
    model = denoiser()
    with torch.no_grad():
        levels = model.schedule.levels(time_grid(model.schedule, 30))
        z = sample(model, levels, torch.randn(4000, 6, generator=g), "heun")
    e = z[:, 1:] * layout().std + layout().mean
    assert (e - e.round()).abs().mean() < 0.01
    torch.testing.assert_close(e.mean(0), layout().mean, rtol=0, atol=0.03)


def test_a_scalar_level_equals_that_of_each_item():
    g, schedule, prediction = torch.Generator().manual_seed(0), make_schedule("flow"), make_prediction("v", layout())
    z, eps, f = sample_rows(20, g), *torch.randn(2, 20, 6, generator=g)
    for t in (0.0, 0.4, 1.0):
        scalar, items = schedule(t), level(t, 20)
        z_t = items.add_noise(z, eps)
        for method in (prediction.network_input, lambda z_t, at_t: prediction.expectation(f, z_t, at_t)):
            torch.testing.assert_close(method(z_t, scalar), method(z_t, items))
        losses = [prediction.loss(f, z, eps, z_t, at_t, 1 + at_t.t) for at_t in (scalar, items)]
        torch.testing.assert_close(*losses)


def test_gradient_of_the_cross_entropy():
    """2 w c_out^2 (P - e) at categories, and that of the squared error at numbers."""
    g, prediction = torch.Generator().manual_seed(0), make_prediction("v", layout())
    z, eps, f = (x.double() for x in (sample_rows(20, g), *torch.randn(2, 20, 6, generator=g)))
    at_t = make_schedule("flow")(torch.linspace(0.2, 0.9, 20, dtype=torch.float64))
    z_t, weight = at_t.add_noise(z, eps), 1 + at_t.t
    f.requires_grad_()
    (gradient,) = torch.autograd.grad(prediction.loss(f, z, eps, z_t, at_t, weight).sum(), f)
    z_hat, scale = prediction.expectation(f, z_t, at_t), (2 * weight * at_t.sigma**2 / (at_t.alpha**2 + at_t.sigma**2))
    torch.testing.assert_close(gradient[:, 1:], scale[:, None] * (z_hat - z)[:, 1:] * layout().std, check_dtype=False)
    c_out = -at_t.sigma / torch.hypot(at_t.alpha, at_t.sigma)
    torch.testing.assert_close(gradient[:, 0], 2 * weight * c_out * (z_hat - z)[:, 0])


def test_clean_latents_stay_unchanged():
    z = sample_rows(20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser()(z, level(0.0, 20))[:, 1:], z[:, 1:])
