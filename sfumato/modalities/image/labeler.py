"""The labeler of images: a classifier of the given ones, and near-duplicates by distances of thumbnails."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sfumato.data.dataset import partly_labelled
from sfumato.errors import UserError
from sfumato.hardware import best_precision, default_device
from sfumato.metrics import NearDuplicates, random_indices
from sfumato.metrics.duplicates import DISTANCE_SAMPLE
from sfumato.modalities.base import report_stage
from sfumato.modalities.image.classifier import MIN_SIDE, Classifier, predict
from sfumato.modalities.image.dataset import ConcatDataset, ImageDataset
from sfumato.modalities.image.evaluator import cached_classifier
from sfumato.modalities.image.metrics import thumbnails
from sfumato.modalities.image.semi_supervised import fit_semi_supervised
from sfumato.types import UNKNOWN, Items, Progress

LABELER_STEPS = 500  # optimizer steps of the classifier on labelled images, at least
LABELER_MAX_STEPS = 2_000  # and at most
LABELER_EPOCHS = 3  # epochs on labelled images, within these bounds
LABELER_BATCH_SIZE = 128  # images per step on labelled images
LABELER_SEMI_STEPS = 2_000  # optimizer steps if some images have no label
LABELER_WIDTH = 24  # channels of the classifier's stem
LABELER_SEED = 54321  # its weights differ from those of the network that `fit` uses for pseudo-labels
EMBEDDING_CHUNK = 1_000  # images embedded at a time
PSEUDO_LABEL_CONFIDENCE = 0.8  # class probability from which on a pseudo-label is accepted


class ImageLabeler:
    """Labels generated and unlabelled images with a classifier that is trained on the given ones, semi-supervised.

    Args:
        given: Images whose labels are class numbers of the model.
        unlabelled: Images without labels.
        names: The model's classes.
        target_column: Must be None: images have labels instead.
        device: Where to compute; default the best available.
        progress: Called as progress(stage, done, total).
    """

    conditional = True

    def __init__(
        self,
        given: ImageDataset,
        unlabelled: Sequence[ImageDataset],
        names: Sequence[str],
        target_column: str | None = None,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if target_column is not None:
            raise UserError(f"--target {target_column} applies to tables only; images have labels")
        if min(given.shape[1:]) < MIN_SIDE:
            size = f"{given.shape[2]}x{given.shape[1]}"
            raise UserError(f"images of {size} pixels are too small to label: at least {MIN_SIDE} are needed", 1)
        if not names:
            raise UserError("the model knows no classes: train one on labelled images")
        self.given, self.names, self.images = given, list(names), ConcatDataset([given, *unlabelled])
        self.labels = torch.from_numpy(self.images.label_numbers[: len(given)])
        self.device, self.progress = device or default_device(), progress

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier, trained once."""
        partly, classes = partly_labelled(self.images.label_numbers), len(self.names)
        epochs = LABELER_EPOCHS * len(self.images) // LABELER_BATCH_SIZE
        steps = LABELER_SEMI_STEPS if partly else min(LABELER_MAX_STEPS, max(LABELER_STEPS, epochs))

        def train() -> Classifier:
            return fit_semi_supervised(
                self.images,
                classes,
                steps=steps,
                width=LABELER_WIDTH,
                seed=LABELER_SEED,
                device=self.device,
                bf16=best_precision(self.device) == "bf16",
            )

        key = (self.images.fingerprint, classes, steps, LABELER_WIDTH, LABELER_SEED)
        with report_stage(self.progress, "train the labeler"):
            net = cached_classifier("labeler", key, self.given.shape, classes, LABELER_WIDTH, train)
        return net.to(self.device)

    def predict(self, items: Items) -> Tensor:
        """Predicted class of each image: (N,)."""
        return predict(self.classifier, items.stack())

    def pseudo_label(self, items: Items) -> Tensor:
        """Predicted class of each image, `UNKNOWN` below the confidence threshold: (N,)."""
        classifier = self.classifier  # trained at the first call, so outside `no_grad`
        with torch.no_grad():
            confidence, label = classifier(items.stack().to(self.device)).softmax(1).max(1)
        return torch.where(confidence < PSEUDO_LABEL_CONFIDENCE, UNKNOWN, label).cpu()

    def embed(self, items: Items) -> Tensor:
        """Thumbnails (N, D) of images, whose distances tell near-duplicates."""
        return thumbnails(items.stack())

    @cached_property
    def duplicates(self) -> NearDuplicates:
        """Finds near-duplicates among embeddings, calibrated on the given and unlabelled images."""

        def embeddings() -> Iterator[Tensor]:
            index = torch.arange(len(self.images)).split(EMBEDDING_CHUNK)
            return (thumbnails(self.images.batch(part).data) for part in index)

        sample = random_indices(len(self.images), DISTANCE_SAMPLE)
        return NearDuplicates(embeddings, thumbnails(self.images.batch(sample).data))
