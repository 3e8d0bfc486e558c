"""The search of the default guidance weight."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.training import guidance_search
from sfumato.training.guidance_search import choose_guidance

TARGET = 0.97  # accuracy on held-out items


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, dict[str, Any]]]:
    """The search, with accuracy and Fréchet distance of each weight given by functions."""

    def run_search(
        accuracy: Callable[[float], float], distance: Callable[[float], float]
    ) -> tuple[float, dict[str, Any]]:
        held_out = SimpleNamespace(labels=np.zeros(50, np.int64))
        run: Any = SimpleNamespace(classes=3, held_out=held_out, settings=SimpleNamespace(seed=0))
        model: Any = SimpleNamespace()
        generated = lambda run, model, network, labels, weight: torch.tensor(weight)
        of_features = lambda x: TARGET if float(x) < 0 else accuracy(float(x))
        monkeypatch.setattr(guidance_search, "affordable_items", lambda run, model: 300)
        monkeypatch.setattr(guidance_search, "real_features", lambda run, network, data, index: torch.tensor(-1.0))
        monkeypatch.setattr(guidance_search, "generated_features", generated)
        monkeypatch.setattr(guidance_search, "frechet", lambda fake, real: distance(float(fake)))
        monkeypatch.setattr(guidance_search, "mean_class_accuracy", lambda network, x, labels: of_features(x))
        network: Any = object()
        return choose_guidance(run, model, network, run.held_out, torch.arange(100) % 3)

    return run_search


def test_the_weight_is_interpolated_to_the_accuracy_of_real_items(search: Callable[..., Any]):
    weight, trials = search(lambda w: 0.94 + 0.2 * (w - 1), lambda w: w)
    assert weight == pytest.approx(1.15) and list(trials) == ["1.0", "1.1", "1.2"]
    assert trials["1.1"] == {"fd": pytest.approx(1.1, abs=1e-3), "accuracy": 0.96}


def test_each_class_counts_equally(monkeypatch: pytest.MonkeyPatch):
    """Nine in ten items are of one class, which is always predicted right; half of the other class is."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    predicted = torch.tensor([0] * 95 + [1] * 5)
    network: Any = SimpleNamespace(head=lambda features: torch.nn.functional.one_hot(features, 2).float())
    assert guidance_search.mean_class_accuracy(network, predicted, labels) == pytest.approx(0.75)
    monkeypatch.setattr(guidance_search, "MAX_REAL_ITEMS", 40)
    index = guidance_search.balanced_sample(labels, 2)
    assert len(set(index.tolist())) == 30 and labels[index].bincount().tolist() == [20, 10]  # no more than there are


def test_no_guidance_if_items_match_their_label_without_it(search: Callable[..., Any]):
    assert search(lambda w: 0.97, lambda w: w)[0] == 1.0


def test_the_smallest_distance_decides_if_no_weight_suffices(search: Callable[..., Any]):
    weight, trials = search(lambda w: 0.5, lambda w: abs(w - 1.3))
    assert weight == 1.3 and len(trials) == len(guidance_search.CANDIDATE_WEIGHTS)
