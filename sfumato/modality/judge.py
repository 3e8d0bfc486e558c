"""The networks that judge images, trained on the training part alone."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.data import Data, cache_root
from sfumato.data.cache import key_of
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device
from sfumato.metrics import Images as Measured
from sfumato.metrics import (
    cached_network,
    classifier_extractor,
    find_inception,
    image_report,
    inception_extractor,
    reconstruction_report,
)
from sfumato.metrics.features import INCEPTION_ENV, NamedExtractor
from sfumato.nn.classifier import SMALLEST, SYMMETRIES, Classifier, Images, fit_classifier

Progress = Callable[[str, int, int], None]

STEPS = 500  # of the network that judges
WIDTH = 24  # channels of its stem
SEED = 12345  # of its weights and order: it is not the network that the codec was trained against
COPIES, NOVELTY = 0.2, 0.7  # more copies than this, or less novelty, and the samples look copied


def judge_cache() -> Path | None:
    """Where trained networks are kept between calls; None where nothing can be written."""
    folder = cache_root() / "metrics"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


class ImageJudge:
    """Networks of one size and length of training, which know the training part alone.

    Args:
        train: The training part.
        device: Where to compute; default the best at hand.
        progress: Who shows how far it is.
        target: Not for images: they have labels.
    """

    by_label = True

    def __init__(
        self, train: Data, device: str | None = None, progress: Progress | None = None, target: str | None = None
    ) -> None:
        if target is not None:
            raise UserError("--column: is a column of a table; images have labels")
        self.train, self.device, self.progress = train, device or default_device(), progress
        self.classes = train.classes

    def tell(self, stage: str, done: int) -> None:
        """Say that a stage begins (0) or is done (1)."""
        if self.progress is not None:
            self.progress(stage, done, 1)

    @cached_property
    def cache(self) -> Path | None:
        """Where networks and statistics are kept between evaluations; None where nothing can be written."""
        return judge_cache()

    @cached_property
    def network(self) -> Classifier:
        """The classifier of the training part (of the square's symmetries without classes), trained once and kept."""
        shape, classes = self.train.shape, self.classes or SYMMETRIES
        if min(shape[1:]) < SMALLEST:
            remedy = f"at least {SMALLEST} are needed, or the weights of Inception under {INCEPTION_ENV}"
            raise UserError(f"images of {shape[2]}x{shape[1]} pixels are too small to be judged: {remedy}", code=1)
        key = key_of("judge", 1, self.train.fingerprint, classes, STEPS, WIDTH, SEED)[:24]
        self.tell("judge", 0)
        net = cached_network(
            self.cache / f"judge-{key}.safetensors" if self.cache else None,
            lambda: Classifier(shape, classes, WIDTH),
            lambda: self._fit(self.train, SEED),
        )
        self.tell("judge", 1)
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
        self.tell("student", 0)
        net = self._fit(data, SEED)
        self.tell("student", 1)
        return lambda x: net(x.to(self.device))

    def _fit(self, data: Images, seed: int) -> Classifier:
        bf16 = best_precision(self.device) == "bf16"
        return fit_classifier(data, self.classes, steps=STEPS, width=WIDTH, seed=seed, device=self.device, bf16=bf16)

    def report(self, fake: Data, held: Data, cas: bool, seed: int) -> dict[str, Any]:
        """What `sfumato.metrics.image_report` says of samples, and `memorised`: whether they look copied."""
        self.tell("measure", 0)
        report = image_report(
            cast("Measured", fake),  # its fingerprint is a cached property, which the type checker takes for none
            cast("Measured", self.train),
            cast("Measured", held),
            self.extractor,
            classifier=self.logits if fake.labelled and held.labelled else None,
            cas=self.student if cas else None,
            cache=self.cache,
            seed=seed,
        )
        self.tell("measure", 1)
        copied = float(report["copies"]) > COPIES + float(report["copies_floor"]) or float(report["novelty"]) < NOVELTY
        return {**report, "memorised": copied}

    def compare(self, x: Tensor, x_hat: Tensor) -> dict[str, float]:
        """PSNR, SSIM and the Fréchet distance of reconstructions."""
        return reconstruction_report(x, x_hat, self.extractor)
