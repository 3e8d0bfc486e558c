"""Labels handed on and learned from images without one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato.data import Data, read_images
from sfumato.nn import semi
from sfumato.nn.classifier import SYMMETRIES, fit_classifier, predict
from sfumato.nn.semi import Guesses, disturbed, fit_semi, moved, partly_labelled
from sfumato.nn.spread import alike, balanced, plain_features, pooled, spread
from sfumato.types import UNKNOWN


def two_moons(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on a circle and on one around it; which one."""
    angle = torch.linspace(0, 2 * torch.pi, count // 2)
    ring = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 1)
    return torch.cat([ring + torch.tensor([0, 0, 1.5]), ring]), torch.arange(2).repeat_interleave(count // 2)


def few_of(data: Data, each: int) -> Data:
    """The same with labels for the first few of each class only."""
    labels = np.full(len(data), UNKNOWN)
    for k in range(10):
        mine = np.flatnonzero(data.labels == k)[:each]
        labels[mine] = k
    return replace(data, labels=labels)


def test_labels_go_along_what_is_alike():
    x, y = two_moons()
    known = torch.tensor([0, 200])
    chance = spread(x, known, y[known], torch.tensor([0.5, 0.5]))
    assert (chance.argmax(1) == y).all() and torch.allclose(chance.sum(1), torch.ones(len(x)))
    graph = alike(x)
    assert abs(graph - graph.T).max() < 1e-9 and np.allclose(graph.diagonal(), 0)
    assert np.abs(np.linalg.eigvalsh(graph.toarray())).max() == pytest.approx(1, abs=1e-6)


def test_shares_of_classes_are_what_they_should_be():
    chance = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 1.0])
    shares = balanced(chance, torch.tensor([0.2, 0.3, 0.5])).mean(0)
    assert torch.allclose(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.01)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 24), (4, 9, 64)])
def test_untrained_eyes_look_at_images_of_any_shape(shape: tuple[int, int, int]):
    x = torch.rand(30, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = plain_features(x)
    assert len(features) == 30 and features.isfinite().all()
    assert plain_features(torch.zeros(30, *shape)).isfinite().all()


def test_each_image_is_moved_by_itself_and_nothing_comes_from_elsewhere():
    x = torch.zeros(50, 1, 9, 9)
    x[:, :, 4, 4] = 1
    places = moved(x, 2, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    rows, columns = places // 9, places % 9
    assert {*rows.tolist()} == {*columns.tolist()} == {2, 3, 4, 5, 6}
    far = disturbed(x, torch.Generator().manual_seed(0))
    assert far.shape == x.shape and far.abs().max() <= 1 and len(far.flatten(1).unique(dim=0)) > 40


def test_guesses_are_balanced_and_weighed():
    prior, target = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.55, 0.45], [0.1, 0.9]])
    alone = Guesses(prior, target, alone=True)
    label, weight = alone(torch.arange(3), None)
    assert label.tolist() == [0, 0, 1] and weight[1] < weight[0]
    joined = Guesses(prior, target, alone=False)
    for _ in range(200):  # the average sees the first class everywhere
        label, _ = joined(torch.arange(3), torch.tensor([[2.0, 0.0]]).expand(3, 2))
    assert label.tolist() == [0, 0, 1]  # the third, though the average sees the first class in it too
    chances = [1 / (1 + math.exp(-2) * math.sqrt(float(other / one))) for one, other in target]
    assert float(joined.seen[0]) == pytest.approx(sum(chances) / 3, abs=0.01)


def test_images_without_a_label_help():
    data, _ = read_images("digits")
    test, part = data.subset(range(1300, 1797)), few_of(data.subset(range(1300)), 4)
    x = test.batch(range(len(test))).data
    right = lambda net: float((predict(net, x).numpy() == test.labels).mean())
    alone = fit_classifier(part.subset(np.flatnonzero(part.labels >= 0)), 10, steps=100, batch=32, width=16)
    both = fit_semi(part, 10, steps=120, batch=128, width=16)
    assert right(both) > max(0.8, right(alone) + 0.04)
    assert not any(p.requires_grad for p in both.parameters()) and not both.training


def test_one_class_and_images_without_a_label_are_told_apart_by_their_symmetries():
    data, _ = read_images("digits")
    part = replace(few_of(data.subset(range(100)), 3), label_names=["digit"])
    assert part.classes == 0
    assert fit_semi(part, part.classes, steps=2, width=16).head.weight.shape[0] == SYMMETRIES


@pytest.mark.parametrize("steps", [0, 1, 29, 30])
def test_any_number_of_steps_will_do(steps: int):
    data, _ = read_images("digits")
    fit_semi(few_of(data.subset(range(60)), 2), 10, steps=steps, batch=8, width=16)


def test_images_that_no_step_will_see_are_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    data, _ = read_images("digits")
    part, looked = few_of(data, 2), list[int]()
    real = semi.plain_features
    monkeypatch.setattr(semi, "plain_features", lambda x: looked.append(len(x)) or real(x))
    for steps, most in ((2, None), (2, 700), (10**4, None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(semi._Pupil, "learn", lambda *_: None)
            fit_semi(part, 10, steps=steps, width=16, most=most)
    assert looked == [20 + 2 * 192, 20 + 700, len(data)]
    assert torch.equal(plain_features(pooled(x := torch.rand(9, 3, 40, 30))), plain_features(x))


def test_the_same_seed_gives_the_same_network_and_all_labelled_is_the_usual_training():
    data, _ = read_images("digits")
    data = data.subset(range(200))
    part = few_of(data, 5)
    a, b, c = (fit_semi(part, 10, steps=4, batch=16, width=16, seed=seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    usual = fit_classifier(data, 10, steps=4, width=16).head.weight
    assert torch.equal(fit_semi(data, 10, steps=4, width=16).head.weight, usual)
    assert partly_labelled(part.labels) and not partly_labelled(data.labels) and not partly_labelled(None)
    assert not partly_labelled(np.full(3, UNKNOWN))
