"""The sets that are compared: a source's parts, samples read or newly generated, under the same class numbers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.config import DataSettings
from sfumato.data import Data, renumbered
from sfumato.errors import UserError
from sfumato.metrics.features import pick
from sfumato.modality import Modality
from sfumato.model import Card, Model, find_class
from sfumato.tasks.common import Progress
from sfumato.tasks.generate import generate


def class_numbers(names: Sequence[str], known: Data) -> NDArray[np.int64] | None:
    """The class in `known` of each name; None without classes, or where a name is not one of them."""
    numbers = [find_class(known.label_names, name) for name in names] if known.classes else []
    found = [number for number in numbers if number is not None]
    return np.array(found, np.int64) if found and len(found) == len(names) else None


def check_samples(
    row: Modality[Any], name: str, made: Data | Card, source: object, real: tuple[Data, Data], cas: bool
) -> None:
    """Refuse samples that cannot be compared with a source's two parts, or where labels are needed and missing."""
    train, held = real
    row.check_fit(name, made.shape, made.mode, source, train)
    if cas and not train.classes:
        raise UserError(f"{source}: has no classes, and --cas needs them")
    if cas and not held.labelled:
        raise UserError(f"{source}: its held-out part has no labels, and --cas needs them")
    if cas and class_numbers(made.label_names, train) is None:
        found = f"has labels that {source} has not" if made.label_names else "has no labels"
        raise UserError(f"{name}: {found}, and --cas needs them")


def relabelled(data: Data, known: Data) -> Data:
    """The same items under the class numbers of `known`; without labels where these do not fit."""
    numbers, labels = class_numbers(data.label_names, known), data.labels
    notes = data.notes
    if numbers is None and labels is not None and known.classes:
        notes = [*notes, "the samples have labels that the source has not: no accuracy"]
    labels = None if numbers is None or labels is None else renumbered(labels, numbers)
    return replace(data, labels=labels, label_names=known.label_names, notes=notes)


def read_real(row: Modality[Any], source: str | Path, settings: DataSettings, mode: Any = None) -> tuple[Data, Data]:
    """Training and held-out part of a source; its numbers are meant as `mode` says, if there is a model."""
    train, held = row.read(str(source), settings, mode)
    if len(held) < row.fewest:
        remedy = "take more data, or a larger share with --set data.held_out=0.3 (of a model when it is trained, too)"
        found = f"only {len(held)} held-out item{'s' * (len(held) != 1)}"
        raise UserError(f"{source}: {found}, at least {row.fewest} are needed; {remedy}", code=1)
    return train, held


def read_samples(row: Modality[Any], folder: str | Path, n: int | None, skip_bad: bool, mode: Any, seed: int) -> Data:
    """Samples from files, read as the source of this mode; n of them at random, or all."""
    data, _ = row.parts(str(folder), DataSettings(skip_bad=skip_bad), mode)
    if len(data) < row.fewest:
        found = f"only {len(data)} sample{'s' * (len(data) != 1)}"
        raise UserError(f"{folder}: {found}, at least {row.fewest} are needed", code=1)
    return data if n is None or n >= len(data) else data.subset(pick(len(data), n, seed))


def draw_samples(model: Model, n: int, seed: int, batch: int, progress: Progress | None) -> Data:
    """New items of a model, as they would be written."""
    items = generate(model, n=n, seed=seed, batch=batch, progress=progress).items
    return model.modality.made(items, model.labels_for(range(n), seed), model.card.mode, model.card.label_names)
