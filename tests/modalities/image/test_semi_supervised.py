"""Label propagation and semi-supervised training."""

import math

import numpy as np
import pytest
import torch

from sfumato.data.dataset import partly_labelled
from sfumato.modalities.image import semi_supervised as semi
from sfumato.modalities.image.classifier import SYMMETRIES, fit_classifier, predict
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.label_propagation import (
    affinity_graph,
    balance_classes,
    downsample,
    handcrafted_features,
    propagate_labels,
)
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.semi_supervised import PseudoLabels, augment, fit_semi_supervised, random_shift
from sfumato.types import UNKNOWN


def two_moons(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two parallel circles, and the number of the circle."""
    angle = torch.linspace(0, 2 * torch.pi, count // 2)
    ring = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 1)
    return torch.cat([ring + torch.tensor([0, 0, 1.5]), ring]), torch.arange(2).repeat_interleave(count // 2)


def partly(data: ImageDataset, per_class: int) -> ImageDataset:
    """The same images with labels for the first of each class only."""
    labels = np.full(len(data), UNKNOWN)
    for k in range(10):
        labels[np.flatnonzero(data.labels == k)[:per_class]] = k
    return data.relabel(labels, list(data.label_names), data.notes)


def test_labels_propagate_along_the_graph():
    x, y = two_moons()
    labelled = torch.tensor([0, 200])
    probs = propagate_labels(x, labelled, y[labelled], torch.tensor([0.5, 0.5]))
    assert (probs.argmax(1) == y).all() and torch.allclose(probs.sum(1), torch.ones(len(x)))
    graph = affinity_graph(x)
    assert abs(graph - graph.T).max() < 1e-9 and np.allclose(graph.diagonal(), 0)
    assert np.abs(np.linalg.eigvalsh(graph.toarray())).max() == pytest.approx(1, abs=1e-6)


def test_balanced_classes_have_the_prior():
    probs = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 1.0])
    shares = balance_classes(probs, torch.tensor([0.2, 0.3, 0.5])).mean(0)
    assert torch.allclose(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.01)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 24), (4, 9, 64)])
def test_handcrafted_features_take_any_shape(shape: tuple[int, int, int]):
    x = torch.rand(30, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = handcrafted_features(x)
    assert len(features) == 30 and features.isfinite().all()
    assert handcrafted_features(torch.zeros(30, *shape)).isfinite().all()


def test_images_are_shifted_and_augmented_independently():
    x = torch.zeros(50, 1, 9, 9)
    x[:, :, 4, 4] = 1
    positions = random_shift(x, 2, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    rows, columns = positions // 9, positions % 9
    assert {*rows.tolist()} == {*columns.tolist()} == {2, 3, 4, 5, 6}
    augmented = augment(x, torch.Generator().manual_seed(0))
    assert augmented.shape == x.shape and augmented.abs().max() <= 1
    assert len(augmented.flatten(1).unique(dim=0)) > 40


def test_pseudo_labels_are_balanced_and_weighted():
    prior, target = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.55, 0.45], [0.1, 0.9]])
    first = PseudoLabels(prior, target, targets_only=True)
    label, weight = first(torch.arange(3), None)
    assert label.tolist() == [0, 0, 1] and weight[1] < weight[0]
    later = PseudoLabels(prior, target, targets_only=False)
    for _ in range(200):  # the teacher predicts the first class everywhere
        label, _ = later(torch.arange(3), torch.tensor([[2.0, 0.0]]).expand(3, 2))
    assert label.tolist() == [0, 0, 1]  # the third against the teacher's prediction
    probs = [1 / (1 + math.exp(-2) * math.sqrt(float(q_1 / q_0))) for q_0, q_1 in target]
    assert float(later.class_average[0]) == pytest.approx(sum(probs) / 3, abs=0.01)


def test_unlabelled_images_improve_the_accuracy():
    data, _ = read_images("digits")
    test, part = data.subset(range(1300, 1797)), partly(data.subset(range(1300)), 4)
    x = test.batch(range(len(test))).data
    accuracy = lambda net: float((predict(net, x).numpy() == test.labels).mean())
    supervised = fit_classifier(part.subset(np.flatnonzero(part.labels >= 0)), 10, steps=100, batch_size=32, width=16)
    both = fit_semi_supervised(part, 10, steps=120, batch_size=128, width=16)
    assert accuracy(both) > max(0.8, accuracy(supervised) + 0.04)
    assert not any(p.requires_grad for p in both.parameters()) and not both.training


def test_one_class_falls_back_to_the_self_supervised_task():
    data, _ = read_images("digits")
    part = partly(data.subset(range(100)), 3)
    part = part.relabel(part.labels, ["digit"], [])
    assert part.classes == 0
    assert fit_semi_supervised(part, part.classes, steps=2, width=16).head.weight.shape[0] == SYMMETRIES


@pytest.mark.parametrize("steps", [0, 1, 29, 30])
def test_any_number_of_steps_is_allowed(steps: int):
    data, _ = read_images("digits")
    fit_semi_supervised(partly(data.subset(range(60)), 2), 10, steps=steps, batch_size=8, width=16)


def test_unlabelled_images_beyond_one_epoch_are_not_used(monkeypatch: pytest.MonkeyPatch):
    data, _ = read_images("digits")
    part, counts = partly(data, 2), list[int]()
    real = semi.handcrafted_features
    monkeypatch.setattr(semi, "handcrafted_features", lambda x: counts.append(len(x)) or real(x))
    for steps, max_unlabelled in ((2, None), (2, 700), (10**4, None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(semi._Student, "fit", lambda *_: None)
            fit_semi_supervised(part, 10, steps=steps, width=16, max_unlabelled=max_unlabelled)
    assert counts == [20 + 2 * 192, 20 + 700, len(data)]
    assert torch.equal(handcrafted_features(downsample(x := torch.rand(9, 3, 40, 30))), handcrafted_features(x))


def test_same_seed_same_network_and_full_labels_train_as_supervised():
    data, _ = read_images("digits")
    data = data.subset(range(200))
    part = partly(data, 5)
    a, b, c = (
        fit_semi_supervised(part, 10, steps=4, batch_size=16, width=16, seed=seed).head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    supervised = fit_classifier(data, 10, steps=4, width=16).head.weight
    assert torch.equal(fit_semi_supervised(data, 10, steps=4, width=16).head.weight, supervised)
    assert partly_labelled(part.labels) and not partly_labelled(data.labels) and not partly_labelled(None)
    assert not partly_labelled(np.full(3, UNKNOWN))
