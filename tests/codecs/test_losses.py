"""Losses that codecs share: reconstruction, hinge losses, adaptive weight and gate."""

import pytest
import torch
from torch import nn

from sfumato.codecs.losses import AdversarialGate, adaptive_weight, frozen, hinge_d, hinge_g, reconstruction
from sfumato.errors import UserError


def test_reconstruction_against_hand_computed_values() -> None:
    x, x_hat = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, -3.0]]], [[[0.0, 0.5]]]])
    torch.testing.assert_close(reconstruction(x_hat, x, "l1"), torch.tensor([2.0, 0.25]))
    torch.testing.assert_close(reconstruction(x_hat, x, "l2"), torch.tensor([5.0, 0.125]))
    assert reconstruction(x_hat.bfloat16(), x).dtype == torch.float32
    with pytest.raises(UserError, match="l1, l2"):
        reconstruction(x_hat, x, "l3")


def test_frozen_restores_what_was_trainable() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    net[2].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError
    not_trainable = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert not_trainable == ["2.bias"]


def test_hinge_against_hand_computed_values() -> None:
    real = torch.tensor([2.0, 0.0]).view(2, 1, 1, 1).requires_grad_()
    fake = torch.tensor([-2.0, 0.5]).view(2, 1, 1, 1).requires_grad_()
    torch.testing.assert_close(hinge_d(real, fake), torch.tensor([0.0, (1 + 1.5) / 2]))
    hinge_d(real, fake).sum().backward()
    assert real.grad is not None and real.grad.flatten().tolist() == [0.0, -0.5]
    assert fake.grad is not None and fake.grad.flatten().tolist() == [0.0, 0.5]
    torch.testing.assert_close(hinge_g(fake), torch.tensor([2.0, -0.5]))


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = torch.ones(4, requires_grad=True)
    rec, adv = (6 * layer).sum(), (2 * layer).sum()
    weight = adaptive_weight(rec, adv, layer)
    assert weight.item() == 3 and not weight.requires_grad and layer.grad is None
    assert adaptive_weight(rec, adv, layer, maximum=0.5) == 0.5
    assert adaptive_weight(rec, 0 * adv, layer, maximum=7.0) == 7
    assert adaptive_weight(rec, float("nan") * adv, layer) == 0
    (rec + weight * adv).backward()
    assert layer.grad is not None and torch.equal(layer.grad, torch.full((4,), 12.0)), "the graph was kept"


def test_gate_ramps_after_its_start_and_closes_for_a_perfect_discriminator() -> None:
    gate = AdversarialGate(start=10, ramp=10, open_accuracy=0.9, closed_accuracy=0.96, floor=0.1)
    assert [round(float(gate(step)), 6) for step in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    for accuracy, factor in ((0.9, 1.0), (0.93, 0.55), (0.96, 0.1), (1.0, 0.1)):
        gate.accuracy.fill_(accuracy)
        torch.testing.assert_close(gate(99), torch.tensor(factor))
    assert AdversarialGate(5)(5) == 0 and AdversarialGate(5)(6) == 1


def test_gate_measures_accuracy_and_resumes() -> None:
    gate = AdversarialGate(start=0, decay=0.5)
    half_correct = torch.tensor([1.0, -1.0])
    gate.update(torch.ones(2), half_correct)
    assert gate.accuracy == 0.5 * 0.5 + 0.5 * 0.75
    resumed = AdversarialGate(start=0, decay=0.5)
    resumed.load_state_dict(gate.state_dict())
    for copy in (gate, resumed):
        copy.update(torch.ones(2), -torch.ones(2))
    assert torch.equal(gate.accuracy, resumed.accuracy) and torch.equal(gate(3), resumed(3))
