"""The predictions: each recovers z, and only z_hat leaves the denoiser."""

import pytest
import torch
from torch import nn

from sfumato.core import PREDICTIONS, SCHEDULES, Denoiser, autoguidance, make_schedule
from sfumato.core.denoiser import CLOCK_LIMIT, ContinuousPrediction, clock
from sfumato.types import Cond

TIMES = torch.tensor([0.001, 0.2, 0.5, 0.9, 0.995], dtype=torch.float64)
NAMES = [name for name in SCHEDULES if name != "table"]


class RecordingNet(nn.Module):
    """A network with a given output that records its inputs."""

    def __init__(self, output=None, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.output = output

    def forward(self, z_in, clocks, cond, mask):
        self.inputs = z_in, clocks, cond, mask
        return (z_in if self.output is None else self.output) * self.scale


def pair(shape=(5, 2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_prediction_recovers_z(name, predict):
    """F = target <=> z_hat = z: the target gives z, and any other F does not."""
    z, eps = pair()
    denoiser = Denoiser(RecordingNet(dtype=torch.float64), make_schedule(name), predict)
    level = denoiser.schedule(TIMES)
    c = denoiser.prediction.preconditioning(level)
    z_t, target = level.add_noise(z, eps), c.target_z[:, None, None] * z + c.target_eps[:, None, None] * eps
    denoiser.net.output = target
    scale = float((c.c_out.abs() * target.flatten(1).abs().amax(1)).max().clamp_min(1))
    assert float((denoiser(z_t, level) - z).detach().abs().max()) < 1e-12 * scale
    denoiser.net.output = target + 1
    assert torch.allclose(denoiser(z_t, level) - z, c.c_out[:, None, None].expand_as(z), atol=1e-9)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_prediction_recovers_z_for_any_alpha_and_sigma(predict):
    """Also for random alpha and sigma that lie on no schedule."""
    alpha, sigma = torch.rand(2, 1000, dtype=torch.float64) + 0.05
    z, eps = torch.randn(2, 1000, dtype=torch.float64)
    c = PREDICTIONS[predict](alpha, sigma)
    z_hat = c.c_skip * (alpha * z + sigma * eps) + c.c_out * (c.target_z * z + c.target_eps * eps)
    assert float((z_hat - z).abs().max()) < 1e-12


def test_edm_preconditioning_is_v():
    """Table 1 of Karras et al. with sigma_data = 1 is the prediction v with the sign of F reversed."""
    schedule = make_schedule("edm")
    prediction, level = ContinuousPrediction("v"), schedule(TIMES)
    sigma, c = schedule.sigma(TIMES), prediction.preconditioning(level)
    assert torch.allclose(c.c_skip, 1 / (sigma**2 + 1))
    assert torch.allclose(c.c_out, -sigma / (sigma**2 + 1).sqrt())
    assert torch.allclose(prediction.network_input(torch.ones_like(sigma), level), 1 / (sigma**2 + 1).sqrt())
    assert torch.allclose(clock(level), sigma.log() / 4)


def test_times_of_each_token():
    z, eps = pair((2, 5, 3))
    level = make_schedule("flow")(torch.rand(2, 5, dtype=torch.float64))
    denoiser = Denoiser(RecordingNet(dtype=torch.float64), make_schedule("flow"), "v")
    joint = denoiser(level.add_noise(z, eps), level)
    assert denoiser.net.inputs[1].shape == (2, 5, 1)
    for i in range(5):
        at_i = level.map(lambda value: value[:, i])
        alone = denoiser(at_i.add_noise(z[:, i], eps[:, i]), at_i)
        assert torch.allclose(joint[:, i], alone, atol=1e-12)
    first = level.map(lambda value: value[:1])  # one time per position for all items: (1, N)
    assert torch.allclose(denoiser(first.add_noise(z, eps), first)[0], joint[0], atol=1e-12)
    assert denoiser.net.inputs[1].shape == (2, 5, 1)


def test_inputs_of_the_network():
    denoiser = Denoiser(RecordingNet(), make_schedule("flow"))
    cond, mask, t = Cond(torch.ones(5, 4)), torch.ones(5, 3, dtype=torch.bool), TIMES.clone()
    t[0], t[-1] = 0.0, 1.0
    z_t, level = torch.randn(5, 3), make_schedule("flow")(t)
    denoiser(z_t, level, cond, mask)
    z_in, clocks, cond_in, mask_in = denoiser.net.inputs
    assert cond_in is cond and mask_in is mask and clocks.shape == (5, 1) and clocks.dtype == torch.float32
    assert clocks.isfinite().all() and clocks[2] == 0 and (clocks.diff(dim=0) > 0).all()
    assert clocks[-1] == -clocks[0] == CLOCK_LIMIT  # not log(1 / 0), but the range of training
    assert torch.allclose(z_in[2], z_t[2] * 2**0.5)
    denoiser(z_t, level)
    assert denoiser.net.inputs[2] == Cond()


def test_a_prediction_of_its_own_decides_what_the_network_sees():
    class Unscaled(ContinuousPrediction):
        def network_input(self, z_t, level):
            return z_t

    schedule, z_t = make_schedule("edm"), torch.randn(5, 3)
    denoiser = Denoiser(RecordingNet(z_t), schedule, Unscaled("eps"))
    z_hat = denoiser(z_t, schedule(TIMES))
    assert torch.equal(denoiser.net.inputs[0], z_t)
    assert torch.equal(z_hat, Denoiser(RecordingNet(z_t), schedule, "eps")(z_t, schedule(TIMES)))


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_half_precision_stays_inside(predict):
    z_t, level = torch.randn(5, 8), make_schedule("flow")(TIMES)
    half = Denoiser(RecordingNet(dtype=torch.bfloat16), make_schedule("flow"), predict)
    z_hat = half(z_t, level)
    assert half.net.inputs[0].dtype == torch.bfloat16 and z_hat.dtype == torch.float32
    cast = Denoiser(_Linear(), make_schedule("flow"), predict)
    with torch.autocast("cpu", torch.bfloat16):
        z_hat = cast(z_t, level)
    assert cast.net.dtypes == (torch.float32, torch.bfloat16) and z_hat.dtype == torch.float32
    assert torch.allclose(z_hat[:3], cast(z_t, level)[:3], atol=0.1)


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, z_in, clocks, cond, mask):
        out = self.linear(z_in)
        self.dtypes = z_in.dtype, out.dtype
        return out


def test_unknown_prediction():
    with pytest.raises(ValueError, match="did you mean 'flow'"):
        Denoiser(RecordingNet(), make_schedule("flow"), "flwo")


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_autoguidance_is_a_lerp_of_the_network_outputs(predict):
    """z_hat is affine in F, so the guided z_hat is the same lerp; weight 1 is the network alone."""
    z, eps = pair()
    schedule = make_schedule("flow")
    level = schedule(TIMES)
    strong, weak = (Denoiser(RecordingNet(f, torch.float64), schedule, predict) for f in (z, eps))
    for w in (0.0, 1.0, 2.5):
        guided = autoguidance(strong.bind(None), weak.bind(None), w)(z, level)
        assert torch.allclose(guided, torch.lerp(weak(z, level), strong(z, level), w), rtol=1e-9)


def test_guide_gets_its_own_condition():
    """It gets the same input and clocks with its own condition."""
    z, _ = pair()
    schedule, strong, weak = make_schedule("flow"), RecordingNet(z, torch.float64), RecordingNet(z, torch.float64)
    cond, guide_cond = Cond(torch.ones(5, 2)), Cond(torch.zeros(5, 2))
    guided = autoguidance(Denoiser(strong, schedule).bind(cond), Denoiser(weak, schedule).bind(guide_cond), 2.0)
    guided(z, schedule(TIMES))
    assert torch.equal(strong.inputs[0], weak.inputs[0]) and torch.equal(strong.inputs[1], weak.inputs[1])
    assert strong.inputs[2] is cond and weak.inputs[2] is guide_cond
