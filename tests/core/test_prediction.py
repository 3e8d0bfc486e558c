"""Predictions: the target gives z, the loss is w (z_hat - z)^2 with its gradient, levels of any shape agree."""

import pytest
import torch

from sfumato.core import PREDICTIONS, make_prediction, make_schedule
from sfumato.core.schedule import append_dims

DOUBLE = {"dtype": torch.float64}
SHAPE = (5, 4, 3)
TIMES = {
    "scalar": torch.tensor(0.3, **DOUBLE),
    "items": torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], **DOUBLE),
    "tokens": torch.linspace(0.02, 0.98, 20, **DOUBLE).reshape(5, 4),
    "positions": torch.linspace(0.1, 0.9, 4, **DOUBLE)[None],
}
NAMES = ["flow", "cosine", "linear", "edm"]


def draw(seed=0):
    """The network's output F, z and eps."""
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def targets(prediction, z, eps, level):
    c = prediction.preconditioning(level)
    return append_dims(c.target_z, z) * z + append_dims(c.target_eps, z) * eps


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_target_gives_z_and_no_loss(predict, name, times):
    (_, z, eps), level, prediction = draw(), make_schedule(name)(TIMES[times]), make_prediction(predict)
    z_t, f = level.add_noise(z, eps), targets(prediction, z, eps, level)
    scale = float((append_dims(prediction.preconditioning(level).c_out, z) * f).abs().max().clamp_min(1))
    assert float((prediction.expectation(f, z_t, level) - z).abs().max()) < 1e-12 * scale
    assert not prediction.loss(f, z, eps, z_t, level).any()


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_loss_is_the_weighted_squared_error_of_z_hat(predict, name, times):
    """Value and gradient, for a weight in the shape of the level and for a number."""
    (f, z, eps), level, prediction = draw(), make_schedule(name)(TIMES[times]), make_prediction(predict)
    z_t = level.add_noise(z, eps)
    f.requires_grad_()
    for weight in (2 + level.t, 0.7, 1.0):
        loss = prediction.loss(f, z, eps, z_t, level, weight)
        w = append_dims(torch.as_tensor(weight, **DOUBLE), z)
        expected = w * (prediction.expectation(f, z_t, level) - z) ** 2
        assert loss.shape == SHAPE and torch.allclose(loss, expected, rtol=1e-8)
        gradients = [torch.autograd.grad(value.sum(), f)[0] for value in (loss, expected)]
        assert torch.allclose(*gradients, rtol=1e-8) and (gradients[0] != 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_scalar_level_equals_that_of_each_item_or_token(predict, name):
    (f, z, eps), prediction, schedule = draw(), make_prediction(predict), make_schedule(name)

    def values(t, dtype):
        level, data = schedule(t), [x.to(dtype) for x in (f, z, eps)]
        z_t = level.add_noise(*data[1:])
        network = prediction.network_input(z_t, level), prediction.expectation(data[0], z_t, level)
        return z_t, *network, prediction.loss(*data, z_t, level, 1 + level.t)

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for t in (0.0, 0.3, 1.0):
            scalar = values(torch.tensor(t, **DOUBLE), dtype)
            for shape in ((5,), (5, 4), (1, 4)):
                expanded = values(torch.full(shape, t, **DOUBLE), dtype)
                for a, b in zip(scalar, expanded, strict=True):
                    assert a.dtype == b.dtype == dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="did you mean 'flow'"):
        make_prediction("flwo")
