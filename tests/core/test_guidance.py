"""Guidance is a lerp; switched off, it costs one evaluation."""

import pytest
import torch

from sfumato.core import cfg, interval, make_schedule, rescale


class CountingDenoiser:
    def __init__(self, seed):
        self.z_hat = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed))
        self.calls = 0

    def __call__(self, z, level):
        self.calls += 1
        return self.z_hat


@pytest.fixture
def pair():
    return CountingDenoiser(0), CountingDenoiser(1)


FLOW = make_schedule("flow")
Z, LEVEL = torch.zeros(4, 3, 2), FLOW(torch.full((4,), 0.5, dtype=torch.float64))


def test_off_costs_one_call(pair):
    conditional, reference = pair
    assert torch.equal(cfg(conditional, reference, 1.0)(Z, LEVEL), conditional.z_hat)
    assert (conditional.calls, reference.calls) == (1, 0)


def test_lerp_is_exact(pair):
    conditional, reference = pair
    for w in (0.0, 1.5, 4.0):
        expected = torch.lerp(reference.z_hat, conditional.z_hat, w)
        assert torch.equal(cfg(conditional, reference, w)(Z, LEVEL), expected)
    assert torch.equal(cfg(conditional, reference, 0.0)(Z, LEVEL), reference.z_hat)


def test_weight_of_each_item(pair):
    conditional, reference = pair
    w = torch.tensor([1.0, 2.0, 0.0, 3.0])
    out = cfg(conditional, reference, w)(Z, LEVEL)
    for i in range(4):
        assert torch.allclose(out[i], torch.lerp(reference.z_hat[i], conditional.z_hat[i], float(w[i])), atol=1e-6)


def test_interval(pair):
    conditional, reference = pair
    guided = cfg(conditional, reference, interval(2.0, 0.2, 0.7))
    for t, on in [(0.1, False), (0.2, True), (0.7, True), (0.8, False)]:
        conditional.calls = reference.calls = 0
        out = guided(Z, FLOW(torch.full((4,), t, dtype=torch.float64)))
        assert (conditional.calls, reference.calls) == (1, int(on))
        expected = torch.lerp(reference.z_hat, conditional.z_hat, 2.0) if on else conditional.z_hat
        assert torch.equal(out, expected)
    mixed = guided(Z, FLOW(torch.tensor([0.1, 0.5, 0.9, 0.5], dtype=torch.float64)))
    assert torch.allclose(mixed[0], conditional.z_hat[0]) and not torch.allclose(mixed[1], conditional.z_hat[1])


def test_rescale(pair):
    conditional, reference = pair
    std = lambda x: x.std((1, 2))
    plain = cfg(conditional, reference, 5.0)(Z, LEVEL)
    full = cfg(conditional, reference, 5.0, rescale(1.0))(Z, LEVEL)
    half = cfg(conditional, reference, 5.0, rescale(0.5))(Z, LEVEL)
    assert torch.allclose(std(full), std(conditional.z_hat))
    assert torch.allclose(half, (plain + full) / 2, atol=1e-6)
    assert torch.equal(cfg(conditional, reference, 5.0, rescale(0.0))(Z, LEVEL), plain)
