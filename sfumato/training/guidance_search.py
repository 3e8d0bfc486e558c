"""Search of the default guidance weight: generated items should match their label as often as real ones do."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sfumato.core import denoiser_evaluations
from sfumato.data.dataset import Dataset
from sfumato.metrics import frechet
from sfumato.modalities.base import FeatureNetwork
from sfumato.model import Model
from sfumato.sampling import balanced_labels, complete_conditions
from sfumato.training.run import Run
from sfumato.types import UNKNOWN, Raw, batch_limit

CANDIDATE_WEIGHTS = (1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
MAX_GENERATED_ITEMS = 1_000  # generated items per weight, at most
MAX_REAL_ITEMS = 5_000  # real items for the Fréchet distance and for the accuracy, at most
SEARCH_SHARE = 0.06  # cost of the search relative to the denoiser's training
MIN_GENERATED_ITEMS, MIN_HELD_OUT_ITEMS = 200, 50  # with fewer items per weight, or held-out items, there is no search

Trials = dict[str, dict[str, float]]  # weight -> metrics


@torch.no_grad()
def choose_guidance(
    run: Run, model: Model, network: FeatureNetwork | None, data: Dataset, label: Tensor | None
) -> tuple[float, Trials]:
    """The smallest weight at which generated items match their label as often as held-out items do.

    The feature network predicts the label; the accuracy is the mean over classes. It rises with the weight while
    diversity falls, so the smallest sufficient weight is the best; it is interpolated between two candidates. If none
    suffices, the one with the smallest Fréchet distance is taken.

    Args:
        run: The run.
        model: The trained model.
        network: The feature network, or None.
        data: Training items of the denoiser.
        label: Their class numbers (N,), or None.

    Returns:
        The weight, and the metrics of each candidate: `fd` (on the feature network's features) and `accuracy`. Without
        enough items, or without labels, the model's current weight and no metrics.
    """
    count = affordable_items(run, model)
    if label is None or network is None or count < MIN_GENERATED_ITEMS or run.held_out.labels is None:
        return model.sampling.guidance, {}
    held_out_labels = torch.from_numpy(run.held_out.labels)
    labelled = (held_out_labels != UNKNOWN).nonzero().flatten()[:MAX_REAL_ITEMS]
    if len(labelled) < MIN_HELD_OUT_ITEMS:
        return model.sampling.guidance, {}
    real = real_features(run, network, data, balanced_sample(label, run.classes))
    target = mean_class_accuracy(
        network, real_features(run, network, run.held_out, labelled), held_out_labels[labelled]
    )
    labels = balanced_labels(run.classes, range(count), run.settings.seed)
    trials: Trials = {}
    for weight in CANDIDATE_WEIGHTS:
        fake = generated_features(run, model, network, labels, weight)
        accuracy = mean_class_accuracy(network, fake, labels)
        trials[str(weight)] = {"fd": round(frechet(fake.cpu(), real.cpu()), 4), "accuracy": round(accuracy, 4)}
        if accuracy >= target:
            return interpolate_weight(trials, target), trials
    return float(min(trials, key=lambda weight: trials[weight]["fd"])), trials


def balanced_sample(labels: Tensor, classes: int) -> Tensor:
    """Indices of a class-balanced random sample of items with labels (N,), `MAX_REAL_ITEMS` at most.

    A class with too few items is taken whole; items without a label are left out.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.cat([order[labels[order] == k][: max(1, MAX_REAL_ITEMS // classes)] for k in range(classes)])


def interpolate_weight(trials: Trials, target: float) -> float:
    """The weight of accuracy `target`, interpolated linearly between the last two trials."""
    last = list(trials.items())[-2:]
    weights, accuracies = [float(weight) for weight, _ in last], [metrics["accuracy"] for _, metrics in last]
    return round(float(np.interp(target, accuracies, weights)), 2)


def affordable_items(run: Run, model: Model) -> int:
    """Number of generated items per weight, so that the search costs `SEARCH_SHARE` of the denoiser's training.

    A training item costs as much as three network evaluations. Steps are counted instead of seconds, so that the result
    does not depend on the machine.
    """
    stage = run.settings.train.denoiser
    training_evaluations = 3 * (stage.steps or 1) * (stage.batch or 1)
    networks = 2 if model.guide is None else 4  # with and without the label, for the model and for the guide
    per_item = networks * denoiser_evaluations(model.sampling.sampler, model.sampling.steps)
    return min(MAX_GENERATED_ITEMS, int(SEARCH_SHARE * training_evaluations / (per_item * len(CANDIDATE_WEIGHTS))))


def real_features(run: Run, network: FeatureNetwork, data: Dataset, index: Tensor) -> Tensor:
    """Features (B, D) of the real items with these indices (B,)."""
    parts = index.split(batch_limit(data.shape, MAX_GENERATED_ITEMS))
    return torch.cat([network.features(data.batch(part).data.to(run.device)) for part in parts])


def generated_features(run: Run, model: Model, network: FeatureNetwork, labels: Tensor, weight: float) -> Tensor:
    """Features (B, D) of generated items with labels (B,) at a guidance weight."""
    sampling = replace(model.sampling, guidance=weight)
    features: list[Tensor] = []
    for items in torch.arange(len(labels)).split(batch_limit(run.train.shape, MAX_GENERATED_ITEMS)):
        numbers, seed = items.tolist(), run.settings.seed
        known = Raw({model.conditioner.primary_label or "": labels[items]})
        raw = complete_conditions(model.conditioner, known, numbers, seed)
        x = model.decode(model.sample(numbers, raw, seed=seed, sampling=sampling)).stack()
        features.append(network.features(x.to(run.device)).float())
    return torch.cat(features)


def mean_class_accuracy(network: FeatureNetwork, features: Tensor, labels: Tensor) -> float:
    """Accuracy of the network's predictions from features (B, D), averaged over the classes that occur."""
    correct = (network.head(features).argmax(1).cpu() == labels.cpu()).float()
    return float(torch.stack([correct[labels.cpu() == k].mean() for k in labels.cpu().unique()]).mean())
