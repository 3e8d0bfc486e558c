"""The guidance weight that is chosen: where items show their label as often as real ones."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.training import choose
from sfumato.training.choose import choose_guidance

WANTED = 0.97


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, dict[str, Any]]]:
    """The choice, where a weight reaches what a function says of it, and has a distance of its own."""

    def choice(reached: Callable[[float], float], distance: Callable[[float], float]) -> tuple[float, dict[str, Any]]:
        held = SimpleNamespace(labels=np.zeros(50, np.int64))
        job: Any = SimpleNamespace(classes=3, held=held, settings=SimpleNamespace(seed=0))
        model: Any = SimpleNamespace(labels_for=lambda items, seed: torch.zeros(len(items)))
        monkeypatch.setattr(choose, "affordable", lambda job, model: 300)
        monkeypatch.setattr(choose, "seen", lambda job, network, data, index: torch.tensor(-1.0))
        monkeypatch.setattr(choose, "drawn", lambda job, model, network, labels, weight: torch.tensor(weight))
        monkeypatch.setattr(choose, "frechet", lambda fake, real: distance(float(fake)))
        of = lambda features: WANTED if float(features) < 0 else reached(float(features))
        monkeypatch.setattr(choose, "accuracy", lambda network, features, labels: of(features))
        network: Any = object()
        return choose_guidance(job, model, network, job.held, torch.arange(100) % 3)

    return choice


def test_between_the_weights_that_miss_and_reach_what_real_items_show(chosen: Callable[..., Any]):
    weight, tried = chosen(lambda w: 0.94 + 0.2 * (w - 1), lambda w: w)
    assert weight == pytest.approx(1.15) and list(tried) == ["1.0", "1.1", "1.2"]
    assert tried["1.1"] == {"fd": pytest.approx(1.1, abs=1e-3), "accuracy": 0.96}


def test_each_class_counts_as_much_as_another(monkeypatch: pytest.MonkeyPatch):
    """Nine in ten items are of one class, which the network always sees; of the other one it sees half."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    seen = torch.tensor([0] * 95 + [1] * 5)
    network: Any = SimpleNamespace(head=lambda features: torch.nn.functional.one_hot(features, 2).float())
    assert choose.accuracy(network, seen, labels) == pytest.approx(0.75)
    monkeypatch.setattr(choose, "REAL", 40)
    some = choose.evenly(labels, 2)
    assert len(set(some.tolist())) == 30 and labels[some].bincount().tolist() == [20, 10]  # no more than there are


def test_none_where_items_show_their_label_anyway(chosen: Callable[..., Any]):
    assert chosen(lambda w: 0.97, lambda w: w)[0] == 1.0


def test_the_nearest_where_no_weight_reaches_it(chosen: Callable[..., Any]):
    weight, tried = chosen(lambda w: 0.5, lambda w: abs(w - 1.3))
    assert weight == 1.3 and len(tried) == len(choose.WEIGHTS)
