"""The weight average: its profile over training, valid from the first step on."""

import math

import pytest
import torch
from torch import nn

from sfumato.training.ema import EMA, UPDATE_ALWAYS_UNTIL, UPDATE_EVERY, ema_exponent


class Theta(nn.Module):
    """One parameter vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((size,), 7.0, dtype=torch.float64))


def profile(width: float, steps: int) -> torch.Tensor:
    """Weight of each step in the average: the parameters of step i are the i-th unit vector."""
    module = Theta(steps)
    ema = EMA(module, width)
    for i in range(steps):
        module.theta.data.zero_()[i] = 1
        ema.update(i + 1)
    return ema.weights["theta"]


@pytest.mark.parametrize("width", [0.25, 0.1, 0.05])
def test_the_profile_has_the_given_width(width: float):
    steps = 1500
    p = profile(width, steps)
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean = (p * t).sum()
    assert float(p.sum()) == pytest.approx(1)
    assert float(((p * (t - mean) ** 2).sum()).sqrt()) == pytest.approx(width, rel=5e-3)


@pytest.mark.parametrize("width", [0.25, 0.1, 0.05])
def test_exponent_solves_the_equation(width: float):
    g = ema_exponent(width)
    assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(width, rel=1e-9)


def test_the_average_is_valid_from_the_first_step():
    assert profile(0.1, 1).tolist() == [1.0]  # the initial weights do not count
    for steps in (2, 3, 10):
        p = profile(0.1, steps)
        assert float(p.sum()) == pytest.approx(1) and bool((p >= 0).all())
        assert bool((p.diff() > 0).all())


def test_later_updates_are_every_few_steps():
    p = profile(0.1, 2 * UPDATE_ALWAYS_UNTIL)
    late = torch.arange(UPDATE_ALWAYS_UNTIL, 2 * UPDATE_ALWAYS_UNTIL)
    updated = (late + 1) % UPDATE_EVERY == 0  # step i + 1 has the i-th weights
    assert bool((p[late[updated]] > 0).all()) and bool((p[late[~updated]] == 0).all())
    assert bool((p[:UPDATE_ALWAYS_UNTIL] > 0).all()) and float(p.sum()) == pytest.approx(1)


def test_width_zero_keeps_the_last_weights():
    assert profile(0, 4).tolist() == [0, 0, 0, 1]
    assert int(profile(0, UPDATE_ALWAYS_UNTIL + UPDATE_EVERY + 1).argmax()) == UPDATE_ALWAYS_UNTIL + UPDATE_EVERY


def test_apply_and_load():
    module = Theta(3)
    ema = EMA(module, 0.1)
    module.theta.data.fill_(1)
    ema.update(1)
    module.theta.data.fill_(2)
    ema.update(2)
    other = EMA(Theta(3), 0.1)
    other.load(ema.weights)
    assert torch.equal(other.weights["theta"], ema.weights["theta"])
    assert bool((module.theta == 2).all())
    ema.apply()
    assert torch.equal(module.theta.data, ema.weights["theta"]) and not bool((module.theta == 2).all())
