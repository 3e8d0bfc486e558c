"""Agreement with the schedulers of diffusers for equal network, betas or sigmas, grid, noise and last step."""

import pytest
import torch
from torch import nn

from sfumato.core import make_prediction, make_schedule, sample

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

K = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, K, dtype=torch.float64) ** 2  # of Stable Diffusion
SHAPE = (4, 3, 6)
STEPS = [8, 20]  # divisors of K, as `trailing` of DDIMScheduler requires for an exact grid


class FixedNet(nn.Module):
    """A fixed network, nonlinear in z and in the timestep k."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(6, 6, generator=generator) / 4, requires_grad=False)

    def forward(self, z, clocks, cond=None, mask=None):
        k = clocks[:, :, None] / K
        return torch.tanh(z @ self.mix + k) + 0.7 * z * k + 0.1 * torch.sin(5 * k)


NET = FixedNet()


def network(model_input, k):
    return NET(model_input, torch.full((len(model_input), 1), float(k)))


def initial(scale=1.0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * scale


def diffusers_sample(scheduler, z, scaled=False, **kwargs):
    """The sampling loop of a diffusers pipeline."""
    for k in scheduler.timesteps:
        model_input = scheduler.scale_model_input(z, k) if scaled else z
        z = scheduler.step(network(model_input, k), k, z, **kwargs).prev_sample
    return z


def sfumato_sample(predict, timesteps, z, sampler, noise=None):
    """The same betas as schedule `table`; timestep k is time (k + 1) / K, and the end is t = 0."""
    schedule, prediction = make_schedule("table", betas=tuple(BETAS.tolist())), make_prediction(predict)
    denoise = lambda z, level: prediction.expectation(network(z, level.t * K - 1), z, level)
    grid = torch.cat([(timesteps.double() + 1) / K, torch.zeros(1, dtype=torch.float64)])
    return sample(denoise, schedule.levels(grid), z, sampler, noise)


def assert_close(a, b):
    error, largest = float((a - b).abs().max()), float(b.abs().max())
    assert error < 1e-4 * largest, (error, largest)


def scheduler_settings(predict, spacing):
    types = {"eps": "epsilon", "v": "v_prediction", "z": "sample"}
    return {"trained_betas": BETAS.numpy(), "prediction_type": types[predict], "timestep_spacing": spacing}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("predict", ["eps", "v", "z"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
class TestTable:
    def test_ddim(self, steps, predict, spacing):
        scheduler = diffusers.DDIMScheduler(
            **scheduler_settings(predict, spacing), clip_sample=False, set_alpha_to_one=True
        )
        scheduler.set_timesteps(steps)
        assert_close(
            sfumato_sample(predict, scheduler.timesteps, initial(), "ddim"), diffusers_sample(scheduler, initial())
        )

    def test_ddpm(self, steps, predict, spacing):
        scheduler = diffusers.DDPMScheduler(
            **scheduler_settings(predict, spacing), clip_sample=False, variance_type="fixed_small"
        )
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(2)
        result = sfumato_sample(
            predict, scheduler.timesteps, initial(), "ddpm", lambda: torch.randn(SHAPE, generator=generator)
        )
        assert_close(result, diffusers_sample(scheduler, initial(), generator=torch.Generator().manual_seed(2)))

    def test_dpm_solver(self, steps, predict, spacing):
        scheduler = diffusers.DPMSolverMultistepScheduler(**scheduler_settings(predict, spacing), solver_order=2)
        scheduler.set_timesteps(steps)
        assert_close(
            sfumato_sample(predict, scheduler.timesteps, initial(), "dpmpp_2m"), diffusers_sample(scheduler, initial())
        )

    def test_sde_dpm_solver(self, steps, predict, spacing):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **scheduler_settings(predict, spacing), solver_order=2, algorithm_type="sde-dpmsolver++"
        )
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(2)
        result = sfumato_sample(
            predict, scheduler.timesteps, initial(), "sde", lambda: torch.randn(SHAPE, generator=generator)
        )
        assert_close(result, diffusers_sample(scheduler, initial(), generator=torch.Generator().manual_seed(2)))

    def test_unipc(self, steps, predict, spacing):
        scheduler = diffusers.UniPCMultistepScheduler(
            **scheduler_settings(predict, spacing), solver_order=2, solver_type="bh2"
        )
        scheduler.set_timesteps(steps)
        assert_close(
            sfumato_sample(predict, scheduler.timesteps, initial(), "unipc"), diffusers_sample(scheduler, initial())
        )

    def test_euler(self, steps, predict, spacing):
        """The scheduler uses z / alpha and sigma / alpha; the step is the same."""
        if predict == "z":
            pytest.skip("EulerDiscreteScheduler does not support it")
        scheduler = diffusers.EulerDiscreteScheduler(**scheduler_settings(predict, spacing))
        scheduler.set_timesteps(steps)
        stretch = float((scheduler.sigmas[0] ** 2 + 1).sqrt())  # 1 / alpha
        result = sfumato_sample(predict, scheduler.timesteps, initial(), "euler")
        assert_close(result, diffusers_sample(scheduler, initial(stretch), scaled=True))


def flow(z, sigmas, sampler):
    schedule, prediction = make_schedule("flow"), make_prediction("flow")
    denoise = lambda z, level: prediction.expectation(network(z, level.t * K), z, level)
    grid = torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])
    return sample(denoise, schedule.levels(grid), z, sampler)


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("steps", STEPS)
def test_flow_match_euler(steps, sampler):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=K)
    sigmas = torch.linspace(1, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    assert_close(flow(initial(), sigmas, sampler), diffusers_sample(scheduler, initial()))


@pytest.mark.parametrize(("sampler", "name"), [("unipc", "UniPC"), ("dpmpp_2m", "DPMSolver")])
@pytest.mark.parametrize("steps", STEPS)
def test_multistep_on_flow(steps, sampler, name):
    scheduler = getattr(diffusers, f"{name}MultistepScheduler")(
        num_train_timesteps=K, prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[:-1]
    z = initial()
    for k, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        z = scheduler.step(
            network(z, sigma * K), k, z
        ).prev_sample  # the timesteps are rounded to integers, sigma is not
    assert_close(flow(initial(), sigmas, sampler), z)
