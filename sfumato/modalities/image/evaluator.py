"""The evaluator of images: a classifier and features, trained on the training part alone."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.data import cache_root
from sfumato.data.cache import key_of
from sfumato.errors import UserError
from sfumato.hardware import best_precision, default_device
from sfumato.metrics import ItemSet, cached_network, classifier_extractor
from sfumato.metrics.features import NamedExtractor
from sfumato.modalities.base import report_stage
from sfumato.modalities.image.classifier import MIN_SIDE, SYMMETRIES, Classifier, LabelledImages, fit_classifier
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.inception import INCEPTION_ENV, find_inception, inception_extractor
from sfumato.modalities.image.metrics import image_report, reconstruction_report
from sfumato.types import Items, Progress

EVALUATOR_STEPS = 500  # optimizer steps of the classifier
EVALUATOR_WIDTH = 24  # channels of its stem
EVALUATOR_SEED = 12345  # of weights and order; not that of the feature network, on which the codec was trained
MAX_EXCESS_COPIES = 0.2  # share of copies above the floor, beyond which samples count as memorised
MIN_NOVELTY = 0.7  # novelty below which samples count as memorised


def network_cache() -> Path | None:
    """Folder of trained networks; None if it cannot be created."""
    folder = cache_root() / "metrics"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def cached_classifier(
    name: str,
    key: Sequence[object],
    shape: tuple[int, int, int],
    classes: int,
    width: int,
    train: Callable[[], Classifier],
) -> Classifier:
    """A classifier from the cache, or trained and stored there.

    Args:
        name: First part of the file's name.
        key: What the weights depend on.
        shape: (C, H, W) of the images.
        classes: Number of classes.
        width: Channels of the stem.
        train: Returns the trained network.
    """
    folder = network_cache()
    path = folder / f"{name}-{key_of(name, 1, *key)[:24]}.safetensors" if folder else None
    return cached_network(path, lambda: Classifier(shape, classes, width), train)


class ImageEvaluator:
    """Measures samples with a classifier of the training part.

    Args:
        train: The training part.
        device: Where to compute; default the best available.
        progress: Called as progress(stage, done, total).
        target_column: Must be None: images have labels instead.
    """

    by_label = True

    def __init__(
        self,
        train: ImageDataset,
        device: str | None = None,
        progress: Progress | None = None,
        target_column: str | None = None,
    ) -> None:
        if target_column is not None:
            raise UserError("--target applies to tables only; images have labels")
        self.train, self.device, self.progress = train, device or default_device(), progress
        self.classes = train.classes

    @cached_property
    def cache(self) -> Path | None:
        """Folder of networks and statistics; None if it cannot be created."""
        return network_cache()

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier of the training part, or of the symmetries of the square without classes; trained once."""
        shape, classes = self.train.shape, self.classes or SYMMETRIES
        if min(shape[1:]) < MIN_SIDE:
            remedy = f"at least {MIN_SIDE} are needed, or the weights of Inception under {INCEPTION_ENV}"
            raise UserError(f"images of {shape[2]}x{shape[1]} pixels are too small to evaluate: {remedy}", code=1)
        key = (self.train.fingerprint, classes, EVALUATOR_STEPS, EVALUATOR_WIDTH, EVALUATOR_SEED)
        with report_stage(self.progress, "train the evaluator"):
            net = cached_classifier("evaluator", key, shape, classes, EVALUATOR_WIDTH, lambda: self._fit(self.train))
        module: Any = net.to(self.device)
        return module.to(memory_format=torch.channels_last)  # as `fit_classifier` returns it, so that results are equal

    @cached_property
    def extractor(self) -> NamedExtractor:
        """Features of Inception if its weights are available, else of the classifier."""
        inception = find_inception(cache_root())
        if inception is not None:
            return inception_extractor(inception, self.device)
        name = "classifier" if self.classes else "orientation-classifier"
        return classifier_extractor(lambda: self.classifier, name, self.device)

    def logits(self, x: Tensor) -> Tensor:
        """The classifier's logits (B, classes) of images (B, C, H, W)."""
        return self.classifier(x.to(self.device))

    def fit_cas_classifier(self, data: LabelledImages) -> Callable[[Tensor], Tensor]:
        """Logits of a new classifier trained on `data`, for the classification accuracy score."""
        with report_stage(self.progress, "train a classifier on samples"):
            net = self._fit(data)
        return lambda x: net(x.to(self.device))

    def _fit(self, data: LabelledImages) -> Classifier:
        return fit_classifier(
            data,
            self.classes,
            steps=EVALUATOR_STEPS,
            width=EVALUATOR_WIDTH,
            seed=EVALUATOR_SEED,
            device=self.device,
            bf16=best_precision(self.device) == "bf16",
        )

    def report(self, fake: ImageDataset, held: ImageDataset, cas: bool, seed: int) -> dict[str, Any]:
        """The metrics of `image_report`, and `memorised`: whether samples are too close to training items."""
        with report_stage(self.progress, "measure"):
            report = image_report(
                cast("ItemSet", fake),  # the type checker does not recognise the property `fingerprint`
                cast("ItemSet", self.train),
                cast("ItemSet", held),
                self.extractor,
                classifier=self.logits if fake.labelled and held.labelled else None,
                cas=self.fit_cas_classifier if cas else None,
                cache=self.cache,
                seed=seed,
            )
        memorised = (
            float(report["copies"]) > MAX_EXCESS_COPIES + float(report["copies_floor"])
            or float(report["novelty"]) < MIN_NOVELTY
        )
        return {**report, "memorised": memorised}

    def reconstruction_metrics(self, x: Items, x_hat: Items) -> dict[str, float]:
        """PSNR, SSIM, L1 and the Fréchet distance of reconstructions."""
        return reconstruction_report(x.stack(), x_hat.stack(), self.extractor)
