"""Which guidance weight `generate` uses by default: items should show their label as often as real ones do."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sfumato.core import denoiser_calls
from sfumato.data import Data
from sfumato.metrics import frechet
from sfumato.model import Model
from sfumato.nn.classifier import Classifier
from sfumato.training.job import Job
from sfumato.types import UNKNOWN, at_once

WEIGHTS = (1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
ITEMS = 1_000
REAL = 5_000
SHARE = 0.06  # of the denoiser's training
FEWEST, FEWEST_HELD = 200, 50  # on fewer made or held-out items nothing is chosen

Tried = dict[str, dict[str, float]]


@torch.no_grad()
def choose_guidance(
    job: Job, model: Model, network: Classifier | None, data: Data, label: Tensor | None
) -> tuple[float, Tried]:
    """The smallest weight at which items show their label as often as held-out ones do.

    The feature network says which label an item shows; each class counts as much as another, whatever its share. Label
    fidelity rises with the weight and diversity falls, so the smallest weight that is faithful is the best, read off
    between two that were tried; where none is, the one of the smallest Fréchet distance is taken.

    Args:
        job: The run.
        model: Trained.
        network: The feature network.
        data: The items that the denoiser learned from.
        label: Class numbers (N,) under which it did.

    Returns:
        The weight, and what each one tried reached: `fd` (on the feature network's features) and `accuracy`.
    """
    count = affordable(job, model)
    if label is None or network is None or count < FEWEST or job.held.labels is None:
        return model.sampling.guidance, {}
    known = torch.from_numpy(job.held.labels != UNKNOWN).nonzero().flatten()[:REAL]
    if len(known) < FEWEST_HELD:
        return model.sampling.guidance, {}
    real = seen(job, network, data, evenly(label, job.classes))
    wanted = accuracy(network, seen(job, network, job.held, known), torch.from_numpy(job.held.labels)[known])
    labels = model.labels_for(range(count), job.settings.seed)
    assert labels is not None
    tried: Tried = {}
    for weight in WEIGHTS:
        fake = drawn(job, model, network, labels, weight)
        reached = accuracy(network, fake, labels)
        tried[str(weight)] = {"fd": round(frechet(fake.cpu(), real.cpu()), 4), "accuracy": round(reached, 4)}
        if reached >= wanted:
            return faithful(tried, wanted), tried
    return float(min(tried, key=lambda weight: tried[weight]["fd"])), tried


def evenly(labels: Tensor, classes: int) -> Tensor:
    """Of items under these labels (N,) some of which each class has as many, or all of a small one; `REAL` at most."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.cat([order[labels[order] == k][: max(1, REAL // classes)] for k in range(classes)])


def faithful(tried: Tried, wanted: float) -> float:
    """The weight at which the accuracy wanted is reached, on a line between the last two weights tried."""
    last = list(tried.items())[-2:]
    weights, reached = [float(weight) for weight, _ in last], [found["accuracy"] for _, found in last]
    return round(float(np.interp(wanted, reached, weights)), 2)


def affordable(job: Job, model: Model) -> int:
    """How many items each weight may be tried on: all of them together cost `SHARE` of the denoiser's training.

    A training item costs as much as three calls of the network; steps, and not seconds, are counted, so that the
    choice does not depend on the machine.
    """
    stage = job.settings.train.denoiser
    calls = 3 * (stage.steps or 1) * (stage.batch or 1)
    networks = 2 if model.guide is None else 4  # with and without the label, and as often of the weaker one
    each = networks * denoiser_calls(model.sampling.sampler, model.sampling.steps)
    return min(ITEMS, int(SHARE * calls / (each * len(WEIGHTS))))


def seen(job: Job, network: Classifier, data: Data, index: Tensor) -> Tensor:
    """Features of real items."""
    parts = index.split(at_once(data.shape, ITEMS))
    return torch.cat([network.features(data.batch(part).data.to(job.device)) for part in parts])


def drawn(job: Job, model: Model, network: Classifier, labels: Tensor, weight: float) -> Tensor:
    """Features of new items of these labels at a guidance weight."""
    how = replace(model.sampling, guidance=weight)
    found: list[Tensor] = []
    for items in torch.arange(len(labels)).split(at_once(job.train.shape, ITEMS)):
        x = model.decode(model.sample(items.tolist(), labels[items], seed=job.settings.seed, how=how))
        found.append(network.features(x.to(job.device)).float())
    return torch.cat(found)


def accuracy(network: Classifier, features: Tensor, labels: Tensor) -> float:
    """How often the network sees the label in these features, the mean over the classes that occur."""
    right = (network.head(features).argmax(1).cpu() == labels.cpu()).float()
    return float(torch.stack([right[labels.cpu() == k].mean() for k in labels.cpu().unique()]).mean())
