"""Known samples: the same noise gives the same result, whatever computes the steps."""

import pytest
import torch

from sfumato.core import SAMPLERS, initial_noise, make_schedule, sample, time_grid

START = torch.tensor([[0.4, -1.1], [1.7, 0.2]], dtype=torch.float64)
# (schedule, sampler): the first item at the data and after 5 of 8 steps
SAMPLES = {
    ("flow", "ddpm"): (0.0248799, 0.2613646, -0.2804293, -0.0840201),
    ("flow", "ddim"): (0.4858528, -0.5474989, 0.3805194, -0.6071148),
    ("flow", "euler"): (0.4858528, -0.5474989, 0.3805194, -0.6071148),
    ("flow", "heun"): (0.5159773, -0.5923903, 0.3903358, -0.6404644),
    ("flow", "dpmpp_2m"): (0.5079889, -0.5880187, 0.3859843, -0.6280930),
    ("flow", "unipc"): (0.5106934, -0.5934440, 0.3879993, -0.6383828),
    ("flow", "abm2"): (0.5073677, -0.5883802, 0.3886571, -0.6399321),
    ("flow", "sde"): (-0.1288685, 0.4922548, -0.3729434, -0.1069796),
    ("cosine", "ddpm"): (0.0852786, 0.1511842, -0.2764848, -0.2833868),
    ("cosine", "ddim"): (0.6565061, -0.7423327, 0.5864911, -0.9252145),
    ("cosine", "euler"): (0.6565061, -0.7423327, 0.5864911, -0.9252145),
    ("cosine", "heun"): (0.6906133, -0.7736257, 0.6163625, -0.9869613),
    ("cosine", "dpmpp_2m"): (0.6899501, -0.7773377, 0.6031930, -0.9627736),
    ("cosine", "unipc"): (0.6949381, -0.7817349, 0.6133253, -0.9865108),
    ("cosine", "abm2"): (0.6918686, -0.7785816, 0.6148025, -0.9884435),
    ("cosine", "sde"): (-0.1895477, 0.4226585, -0.3819007, -0.3435136),
    ("edm", "ddpm"): (-0.6235293, 0.0170711, -1.2645613, -0.2883325),
    ("edm", "ddim"): (0.7691737, -0.7571599, 1.1601054, -1.8376350),
    ("edm", "euler"): (0.7691737, -0.7571599, 1.1601054, -1.8376350),
    ("edm", "heun"): (0.7325905, -0.6766045, 1.1025340, -1.5768475),
    ("edm", "dpmpp_2m"): (0.7488832, -0.7102562, 1.0589308, -1.8834768),
    ("edm", "unipc"): (0.7524915, -0.7039857, 1.0337333, -1.9014194),
    ("edm", "abm2"): (0.7427697, -0.7210329, 0.9062964, -1.9496322),
    ("edm", "sde"): (-0.6400026, 0.8176065, -2.0138476, -0.1357847),
    ("linear", "ddpm"): (-0.2463510, 0.7335951, -1.0148483, 0.1486772),
    ("linear", "ddim"): (0.6923885, -0.8634546, 0.5529530, -1.1985429),
    ("linear", "euler"): (0.6923885, -0.8634546, 0.5529530, -1.1985429),
    ("linear", "heun"): (0.7287430, -0.8735590, 0.5713422, -1.2360747),
    ("linear", "dpmpp_2m"): (0.7266651, -0.8769889, 0.5632094, -1.2303718),
    ("linear", "unipc"): (0.7323564, -0.8772551, 0.5672833, -1.2377676),
    ("linear", "abm2"): (0.7373994, -0.8776381, 0.5736034, -1.2509987),
    ("linear", "sde"): (-0.3204255, 0.8811974, -1.1368377, 0.1415824),
}


def denoise(z, level):
    """A fixed function, nonlinear in z and t."""
    t = level.t
    return torch.tanh(z * (0.6 + 0.4 * torch.cos(3 * t)) + 0.2 * t) + 0.1 * torch.sin(2 * z)


def noise_fn():
    """Fixed numbers in place of noise."""
    draws = iter(range(100))
    return lambda: torch.cos(next(draws) + 1.7 * torch.arange(4, dtype=torch.float64)).reshape(2, 2)


@pytest.mark.parametrize(("name", "sampler"), SAMPLES)
def test_samples_are_known(name, sampler):
    schedule = make_schedule(name)
    levels = schedule.levels(time_grid(schedule, 8))
    start = initial_noise(levels[0], lambda: START)
    ends = [sample(denoise, path, start, sampler, noise_fn())[0] for path in (levels, levels[:6])]
    assert torch.cat(ends).tolist() == pytest.approx(SAMPLES[name, sampler], rel=0, abs=1e-6)


def test_every_sampler_is_tested():
    assert {sampler for _, sampler in SAMPLES} == set(SAMPLERS)
