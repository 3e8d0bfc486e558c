"""The sets that `evaluate` compares: a source's two parts, and samples with the same class numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfumato.conditioners import find_class
from sfumato.config import DataSettings
from sfumato.data.dataset import Dataset
from sfumato.data.metadata import renumber_labels
from sfumato.errors import UserError
from sfumato.metrics.features import random_indices
from sfumato.modalities.base import Modality
from sfumato.model import Model
from sfumato.sampling import new_conditions
from sfumato.storage import ModelConfig
from sfumato.tasks.generate import generate
from sfumato.types import Progress


def matching_classes(names: Sequence[str], real: Dataset) -> NDArray[np.int64] | None:
    """The class number in `real` of each name; None without classes, or if a name is not one of them."""
    numbers = [find_class(real.label_names, name) for name in names] if real.classes else []
    found = [number for number in numbers if number is not None]
    return np.array(found, np.int64) if found and len(found) == len(names) else None


def check_samples(
    modality: Modality[Any],
    name: str,
    samples: Dataset | ModelConfig,
    source: object,
    real: tuple[Dataset, Dataset],
    cas: bool,
) -> None:
    """Refuse samples that cannot be compared with a source's two parts, or that lack labels for `cas`."""
    train, held_out = real
    modality.check_compatible(name, samples.shape, samples.spec, source, train)
    if cas and not train.classes:
        raise UserError(f"{source}: has no classes, which --cas needs")
    if cas and not held_out.labelled:
        raise UserError(f"{source}: its held-out part has no labels, which --cas needs")
    if cas and matching_classes(samples.label_names, train) is None:
        found = f"has labels that {source} does not have" if samples.label_names else "has no labels"
        raise UserError(f"{name}: {found}; --cas needs labels of the source")


def match_labels(samples: Dataset, real: Dataset) -> Dataset:
    """The samples with the class numbers of `real`; without labels if these do not match."""
    numbers, labels = matching_classes(samples.label_names, real), samples.labels
    notes = samples.notes
    if numbers is None and labels is not None and real.classes:
        notes = [*notes, "the samples have labels that the source does not have: no accuracy"]
    labels = None if numbers is None or labels is None else renumber_labels(labels, numbers)
    return samples.relabel(labels, list(real.label_names), notes)


def read_real(
    modality: Modality[Any], source: str | Path, settings: DataSettings, spec: Any = None
) -> tuple[Dataset, Dataset]:
    """Training and held-out part of a source, read with the model's spec if there is a model."""
    train, held_out = modality.read_split(str(source), settings, spec)
    if len(held_out) < modality.min_items:
        found = f"only {len(held_out)} held-out item{'s' * (len(held_out) != 1)}, at least {modality.min_items} needed"
        remedy = "use more data, or a larger share with --set data.held_out=0.3 (also when the model is trained)"
        raise UserError(f"{source}: {found}; {remedy}", code=1)
    return train, held_out


def read_samples(
    modality: Modality[Any], path: str | Path, n: int | None, skip_bad: bool, spec: Any, seed: int
) -> Dataset:
    """Samples from files, read with the source's spec: n random ones, or all."""
    data, _ = modality.read(str(path), DataSettings(skip_bad=skip_bad), spec)
    if len(data) < modality.min_items:
        found = f"only {len(data)} sample{'s' * (len(data) != 1)}, at least {modality.min_items} needed"
        raise UserError(f"{path}: {found}", code=1)
    return data if n is None or n >= len(data) else data.subset(random_indices(len(data), n, seed))


def draw_samples(model: Model, n: int, seed: int, batch: int, progress: Progress | None) -> Dataset:
    """New items of a model, as they would be written and read back."""
    items = generate(model, n=n, seed=seed, batch=batch, progress=progress).items
    labels = new_conditions(model.conditioner, range(n), seed).values.get(model.conditioner.primary_label or "")
    label_numbers = labels if isinstance(labels, Tensor) else None
    return model.modality.from_samples(items, label_numbers, model.config.spec, model.config.label_names)
