"""The classifier: learns its labels, takes any size, and its weights depend on the seed alone."""

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.modalities.image.classifier import SYMMETRIES, Classifier, dihedral, fit_classifier, predict
from sfumato.types import Batch


class Ramps:
    """Two classes: brightness rises to the right, or downwards."""

    def __init__(self, n, seed=0, size=12, labelled=True):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n) % 2
        ramp = torch.linspace(-1, 1, size).expand(size, size)
        pairs = torch.stack([ramp, ramp.T])[self.y, None]
        self.x = pairs + 0.3 * torch.randn(n, 1, size, size, generator=generator)
        self.labels = np.asarray(self.y) if labelled else None

    def __len__(self):
        return len(self.x)

    def batch(self, index):
        return Batch(self.x[index], index)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 20), (4, 32, 32), (2, 64, 96), (3, 128, 128)])
def test_any_size_and_number_of_channels(shape):
    net = Classifier(shape, 5, width=8).eval()
    x = torch.randn(2, *shape, requires_grad=True)
    maps = net.pyramid(x)
    sides = [m.shape[-1] for m in maps]
    assert len(maps) >= 3 and sides == sorted(sides, reverse=True) and min(maps[-1].shape[-2:]) >= 2
    assert net(x).shape == (2, 5) and net.features(x).shape == (2, net.dim)
    sum(m.square().mean() for m in maps).backward()
    assert x.grad.abs().sum() > 0
    assert net(torch.randn(1, shape[0], 41, 37)).shape == (1, 5)
    with pytest.raises(ValueError, match="8"):
        Classifier((1, 7, 28), 5)


def test_labels_are_learned_and_weights_depend_on_the_seed_alone():
    train, test = Ramps(256), Ramps(128, seed=1)
    before = torch.get_rng_state()
    nets = [fit_classifier(train, 2, steps=25, batch_size=32, width=8, seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert (predict(nets[0], test.x) == test.y).float().mean() > 0.97
    assert not nets[0].training and not any(p.requires_grad for p in nets[0].parameters())


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6])
def test_any_number_of_steps_is_allowed(steps):
    fit_classifier(Ramps(32), 2, steps=steps, batch_size=8, width=8)


def test_folded_is_the_same_function_without_batch_normalisation():
    net = Classifier((1, 16, 16), 3, 8)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.running_mean, part.bias.data):
                values.normal_()
            for values in (part.running_var, part.weight.data):
                values.uniform_(0.5, 2.0)
    x, folded = torch.randn(4, 1, 16, 16), net.eval().folded()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    for actual, expected in zip(folded.pyramid(x), net.pyramid(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(part, nn.BatchNorm2d) for part in net.modules())


def test_dihedral_gives_eight_different_images_and_flips_are_their_own_inverse():
    x = torch.arange(9.0).view(1, 1, 3, 3).expand(8, -1, -1, -1)
    transformed = dihedral(x, torch.arange(8))
    assert len({tuple(m.flatten().tolist()) for m in transformed}) == 8
    assert (
        torch.equal(transformed[0], x[0])
        and torch.equal(transformed[1], x[0].flip(-1))
        and torch.equal(transformed[4], x[0].mT)
    )
    for symmetry in range(1, 4):
        twice = dihedral(dihedral(x, torch.full((8,), symmetry)), torch.full((8,), symmetry))
        assert torch.equal(twice, x)


def test_without_labels_it_learns_the_symmetries():
    generator = torch.Generator().manual_seed(0)
    data = Ramps(256, labelled=False)
    shape = torch.zeros(12, 12)
    shape[1:10, 2:4], shape[1:3, 2:9], shape[5, 2:7] = 1, 1, 1  # an F: no symmetry of its own
    data.x = 2 * shape - 1 + 0.2 * torch.randn(256, 1, 12, 12, generator=generator)
    net = fit_classifier(data, steps=60, batch_size=64, width=8)
    assert net.classes == SYMMETRIES
    symmetry = torch.arange(256) % 8
    assert (predict(net, dihedral(data.x, symmetry)) == symmetry).float().mean() > 0.9


def test_tiny_data_sets_and_oblong_images_train():
    data = Ramps(2, labelled=False)
    data.x = torch.randn(2, 1, 8, 16)
    assert fit_classifier(data, steps=2, batch_size=4, width=8).classes == SYMMETRIES
    assert (
        fit_classifier(Ramps(3), 1, steps=1, batch_size=4, width=8).classes == SYMMETRIES
    )  # one class has nothing to learn
