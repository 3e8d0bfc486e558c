"""The networks that judge images, and the sets they judge: a source's parts, samples read or newly generated."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.config import DataSettings
from sfumato.data import Data, cache_root, read_images
from sfumato.data.cache import key_of
from sfumato.data.write import to_pixels
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device
from sfumato.metrics import cached_network, classifier_extractor, find_inception, inception_extractor
from sfumato.metrics.features import INCEPTION_ENV, NamedExtractor, pick
from sfumato.modality import recognise
from sfumato.model import Card, Model, find_class
from sfumato.nn.classifier import SMALLEST, SYMMETRIES, Classifier, Images, fit_classifier
from sfumato.tasks.common import Progress, check_fit, tell
from sfumato.tasks.generate import generate

STEPS = 500  # of the network that judges
WIDTH = 24  # channels of its stem
SEED = 12345  # of its weights and order: it is not the network that the codec was trained against
FEWEST = 2  # items of each set: one has no variance


class Judge:
    """Networks of one size and length of training, which know the training part alone.

    Args:
        train: The training part.
        device: Where to compute; default the best at hand.
        progress: Who shows how far it is.
    """

    def __init__(self, train: Data, device: str | None = None, progress: Progress | None = None) -> None:
        self.train, self.device, self.progress = train, device or default_device(), progress
        self.classes = class_count(train)

    @cached_property
    def cache(self) -> Path | None:
        """Where networks and statistics are kept between evaluations; None where nothing can be written."""
        folder = cache_root() / "metrics"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return folder

    @cached_property
    def network(self) -> Classifier:
        """The classifier of the training part (of the square's symmetries without classes), trained once and kept."""
        shape, classes = self.train.shape, self.classes or SYMMETRIES
        if min(shape[1:]) < SMALLEST:
            remedy = f"at least {SMALLEST} are needed, or the weights of Inception under {INCEPTION_ENV}"
            raise UserError(f"images of {shape[2]}x{shape[1]} pixels are too small to be judged: {remedy}", code=1)
        key = key_of("judge", 1, self.train.fingerprint, classes, STEPS, WIDTH, SEED)[:24]
        tell(self.progress, "judge", 0, 1)
        net = cached_network(
            self.cache / f"judge-{key}.safetensors" if self.cache else None,
            lambda: Classifier(shape, classes, WIDTH),
            lambda: self._fit(self.train, SEED),
        )
        tell(self.progress, "judge", 1, 1)
        module: Any = net.to(self.device)
        return module.to(memory_format=torch.channels_last)  # as `fit_classifier` leaves it: the same numbers

    @cached_property
    def extractor(self) -> NamedExtractor:
        """Features of Inception where its weights are at hand, else of the network."""
        inception = find_inception(cache_root())
        if inception is not None:
            return inception_extractor(inception, self.device)
        name = "classifier" if self.classes else "orientation-classifier"
        return classifier_extractor(lambda: self.network, name, self.device)

    def logits(self, x: Tensor) -> Tensor:
        """What the network sees in images (B, C, H, W): (B, classes)."""
        return self.network(x.to(self.device))

    def student(self, data: Images) -> Callable[[Tensor], Tensor]:
        """The logits of a classifier trained on these images instead, for the classification accuracy score."""
        tell(self.progress, "student", 0, 1)
        net = self._fit(data, SEED)
        tell(self.progress, "student", 1, 1)
        return lambda x: net(x.to(self.device))

    def _fit(self, data: Images, seed: int) -> Classifier:
        bf16 = best_precision(self.device) == "bf16"
        return fit_classifier(data, self.classes, steps=STEPS, width=WIDTH, seed=seed, device=self.device, bf16=bf16)


def class_count(data: Data) -> int:
    """Number of classes; 0 without labels, or with one only."""
    return len(data.label_names) if data.labels is not None and len(data.label_names) > 1 else 0


def class_numbers(names: Sequence[str], known: Data) -> NDArray[np.int64] | None:
    """The class in `known` of each name; None without classes, or where a name is not one of them."""
    numbers = [find_class(known.label_names, name) for name in names] if class_count(known) else []
    found = [number for number in numbers if number is not None]
    return np.array(found, np.int64) if found and len(found) == len(names) else None


def check_samples(name: str, made: Data | Card, source: object, train: Data, cas: bool) -> None:
    """Refuse samples that cannot be compared with a source, or have not the labels that are needed."""
    check_fit(name, made.shape, made.mode, source, train)
    if cas and not class_count(train):
        raise UserError(f"{source}: has no classes, and --cas needs them")
    if cas and class_numbers(made.label_names, train) is None:
        found = f"has labels that {source} has not" if made.label_names else "has no labels"
        raise UserError(f"{name}: {found}, and --cas needs them")


def relabelled(data: Data, known: Data) -> Data:
    """The same items under the class numbers of `known`; without labels where these do not fit."""
    numbers, labels = class_numbers(data.label_names, known), data.labels
    notes = data.notes
    if numbers is None and labels is not None and class_count(known):
        notes = [*notes, "the samples have labels that the source has not: no accuracy"]
    labels = None if numbers is None or labels is None else numbers[labels]
    return replace(data, labels=labels, label_names=known.label_names, notes=notes)


def read_real(source: str | Path, settings: DataSettings) -> tuple[Data, Data]:
    """Training and held-out part of a source."""
    train, held = recognise(str(source)).read(str(source), settings)
    if len(held) < FEWEST:
        remedy = "take more data, or a larger share with --set data.held_out=0.3"
        raise UserError(f"{source}: only {len(held)} held-out item, at least {FEWEST} are needed; {remedy}", code=1)
    return train, held


def read_samples(folder: str | Path, n: int | None, skip_bad: bool, seed: int) -> Data:
    """Samples from files; n of them at random, or all."""
    data, _ = read_images(folder, skip_bad=skip_bad)
    if len(data) < FEWEST:
        raise UserError(f"{folder}: only {len(data)} sample, at least {FEWEST} are needed", code=1)
    return data if n is None or n >= len(data) else data.subset(pick(len(data), n, seed))


def draw_samples(model: Model, n: int, seed: int, batch: int, progress: Progress | None) -> Data:
    """New items of a model, as the integers that would be written."""
    items = generate(model, n=n, seed=seed, batch=batch, progress=progress).items
    labels, card = model.labels_for(range(n), seed), model.card
    pixels = to_pixels(items, card.mode)
    return Data(pixels, card.mode, None, None if labels is None else labels.numpy(), card.label_names)
