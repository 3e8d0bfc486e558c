"""What tells whether made images belong into a labelled set: a classifier of given ones, and distances in pixels."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sfumato.data import Data, Joined
from sfumato.data.cache import key_of
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device
from sfumato.metrics import Copies, cached_network, pick
from sfumato.metrics.copies import CHECKED
from sfumato.metrics.images import thumbnails
from sfumato.modality.judge import judge_cache
from sfumato.modality.row import Progress
from sfumato.nn.classifier import SMALLEST, Classifier, predict
from sfumato.nn.semi import fit_semi, partly_labelled
from sfumato.types import UNKNOWN

STEPS, SEMI_STEPS = 500, 2_000  # of the classifier, where all images are labelled, and where some are not
PASSES, MOST_STEPS, BATCH = 3, 2_000, 128  # through many labelled images, which say more than `STEPS` can take in
WIDTH = 24  # channels of its stem
CHUNK = 1_000  # images that are compared at once
SURE = 0.8  # chance of a class from which on an image without a label is taken to be of it
SEED = 54321  # of its weights: not those of the network that `fit` labels by


class ImageSorter:
    """Sorts made images by a network that learns from the given ones, and from any number without a label.

    Args:
        given: Images whose labels are class numbers of the model.
        others: Images without labels.
        names: The model's classes.
        target: None: images have no columns.
        device: Where to compute; default the best at hand.
        progress: Who shows how far it is.
    """

    asked = True  # the model makes an image of the class it is asked for

    def __init__(
        self,
        given: Data,
        others: Sequence[Data],
        names: Sequence[str],
        target: str | None = None,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if target is not None:
            raise UserError(f"--target {target}: is for tables; images bring their labels with them")
        if min(given.shape[1:]) < SMALLEST:
            size = f"{given.shape[2]}x{given.shape[1]}"
            raise UserError(f"images of {size} pixels are too small to be sorted: at least {SMALLEST} are needed", 1)
        if not names:
            raise UserError("the model knows no classes: train one on labelled images")
        self.given, self.names, self.all = given, list(names), Joined([given, *others])
        self.labels = torch.from_numpy(self.all.numbers[: len(given)])
        self.device, self.progress = device or default_device(), progress

    @cached_property
    def network(self) -> Classifier:
        """The classifier, trained once and kept."""
        partly, classes = partly_labelled(self.all.numbers), len(self.names)
        steps = SEMI_STEPS if partly else min(MOST_STEPS, max(STEPS, PASSES * len(self.all) // BATCH))
        key = key_of("sorter", 1, self.all.fingerprint, classes, steps, WIDTH, SEED)[:24]
        cache = judge_cache()
        if self.progress is not None:
            self.progress("sort", 0, 1)
        net = cached_network(
            cache / f"sorter-{key}.safetensors" if cache else None,
            lambda: Classifier(self.given.shape, classes, WIDTH),
            lambda: fit_semi(
                self.all,
                classes,
                steps=steps,
                width=WIDTH,
                seed=SEED,
                device=self.device,
                bf16=best_precision(self.device) == "bf16",
            ),
        )
        if self.progress is not None:
            self.progress("sort", 1, 1)
        return net.to(self.device)

    def shown(self, items: Tensor) -> Tensor:
        """The class that the network sees in each image (N, C, H, W): (N,)."""
        return predict(self.network, items)

    def guessed(self, items: Tensor) -> Tensor:
        """The class that the network sees in each image (N, C, H, W), `UNKNOWN` where it is not sure: (N,)."""
        network = self.network  # trained at the first call
        with torch.no_grad():
            sure, label = network(items.to(self.device)).softmax(1).max(1)
        return torch.where(sure < SURE, UNKNOWN, label).cpu()

    def points(self, items: Tensor) -> Tensor:
        """Images (N, C, H, W) as points (N, D): their pixels, averaged down to at most 32 a side."""
        return thumbnails(items)

    @cached_property
    def copies(self) -> Copies:
        """What tells copies of given images, with a label or without, and of made ones."""

        def real() -> Iterator[Tensor]:
            return (self.points(self.all.batch(index).data) for index in torch.arange(len(self.all)).split(CHUNK))

        return Copies(real, self.points(self.all.batch(pick(len(self.all), CHECKED)).data))
