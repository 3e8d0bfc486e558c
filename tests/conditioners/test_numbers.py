"""Numbers: standardised, told apart, smooth far from the mean, null where unknown."""

import pytest
import torch
from torch import Tensor

from sfumato.conditioners import NumberCondition

NONE = torch.zeros(1, dtype=torch.bool)


def make(mean: float = 10.0, std: float = 2.0) -> NumberCondition:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NumberCondition(mean, std, dim=32)


def embed(condition: NumberCondition, *values: float) -> Tensor:
    out = condition.embed(torch.tensor(values)).vector
    assert out is not None
    return out


def test_a_number_is_standardised() -> None:
    a, b = make(10.0, 2.0), make(-500.0, 100.0)
    assert torch.allclose(embed(a, 7.0, 10.0, 12.0), embed(b, -650.0, -500.0, -400.0), atol=1e-5)


def test_vectors_have_the_scale_of_a_label() -> None:
    v = embed(make(), *range(-30, 50))
    assert torch.allclose(v.mean(1), torch.zeros(80), atol=1e-5)
    assert torch.allclose(v.square().mean(1), torch.ones(80), atol=1e-3)


def test_values_within_four_standard_deviations_are_told_apart() -> None:
    u = torch.arange(-4, 4.01, 0.05).tolist()
    v = embed(make(0.0, 1.0), *u)
    distance = torch.cdist(v, v) + 10 * torch.eye(len(u))
    assert distance.min() > 0.05
    assert distance.argmin(1).sub(torch.arange(len(u))).abs().max() == 1  # the nearest is a neighbour


def test_extrapolation_does_not_oscillate() -> None:
    """Far from the mean a step changes the vector ever less, and wild values stay finite."""
    v = embed(make(0.0, 1.0), *range(12, 60))
    steps = v.diff(dim=0).norm(dim=1)
    assert (steps[1:] <= steps[:-1] + 1e-4).all() and steps[-1] < 0.1
    assert embed(make(0.0, 1e-3), -3e38, 3e38).isfinite().all()


def test_a_constant_column() -> None:
    assert embed(make(5.0, 0.0), 5.0, 6.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    out = make().embed(torch.tensor([7, 12], dtype=dtype)).vector
    assert out is not None and torch.equal(out, embed(make(), 7.0, 12.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_unknown(value: float) -> None:
    condition = make()
    assert not condition.known(torch.tensor([value])).any()
    assert torch.equal(embed(condition, value), embed(condition, 10.0)), "the mean stands for it before the null does"
    assert torch.equal(condition(torch.tensor([value]), NONE).vector[0], condition.null_vector)
