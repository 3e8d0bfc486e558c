"""The contract of a modality (all code specific to one kind of data), and mixins for optional abilities.

A new modality needs a `Dataset`, a `Codec`, an `Evaluator` and a subclass of `Modality`. `tests/modalities` has a small
example, and contract tests that run over all modalities.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sfumato.codecs import Codec
from sfumato.config import CodecSettings, DataSettings, Settings
from sfumato.data.dataset import Dataset, split
from sfumato.errors import UserError
from sfumato.metrics import Extractor, NearDuplicates
from sfumato.types import Items, Progress

D = TypeVar("D", bound=Dataset)
D_contra = TypeVar("D_contra", contravariant=True)


@dataclass(frozen=True)
class PlanContext:
    """Data and machine that a run is planned for.

    Args:
        shape: Shape of an item.
        spec: What the values of an item mean, as a JSON value.
        count: Number of training items.
        classes: Number of classes; 0 without labels.
        precision: `bf16` or `fp32`.
        throughput: (stage, settings) -> measured training speed in items per second; None if the plan must not
            depend on the machine.
    """

    shape: tuple[int, ...]
    spec: Any
    count: int
    classes: int
    precision: str
    throughput: Callable[[str, Settings], float] | None = None


@dataclass(frozen=True)
class Strata:
    """Groups of items to generate, such as the rows that match a condition.

    Args:
        names: Name of each stratum.
        assign: Items -> stratum of each item (N,), -1 for none.
        fixed: Values that all items of a stratum share (strata, ...), NaN where they are free.
    """

    names: list[str]
    assign: Callable[[Items], Tensor]
    fixed: Tensor


class Evaluator(Protocol[D_contra]):
    """Compares samples with one source.

    Attributes:
        by_label: Whether `cas` (classification accuracy score) predicts labels, which both sets must then have.
    """

    by_label: bool

    def report(self, fake: D_contra, held: D_contra, cas: bool, seed: int) -> dict[str, Any]:
        """Metrics of samples as JSON values, and `memorised`: whether they look copied from the training part.

        The floor of a metric `name`, the score of real held-out items, is in `name_floor`.
        """
        ...

    def reconstruction_metrics(self, x: Items, x_hat: Items) -> dict[str, float]:
        """Reconstruction metrics of items x̂ against x."""
        ...


class Labeler(Protocol):
    """Labels generated and unlabelled items.

    Attributes:
        names: Names of the classes.
        labels: Class number of each given item (N,), `UNKNOWN` without a label.
        conditional: Whether the model can generate a requested class; if not, classes come as they are generated.
        duplicates: Finds near-duplicates among embeddings.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def conditional(self) -> bool: ...

    @cached_property
    def duplicates(self) -> NearDuplicates: ...

    def predict(self, items: Items) -> Tensor:
        """Predicted class (N,) of each item, `UNKNOWN` for implausible items."""
        ...

    def pseudo_label(self, items: Items) -> Tensor:
        """Predicted class (N,) of unlabelled items, `UNKNOWN` below the confidence threshold."""
        ...

    def embed(self, items: Items) -> Tensor:
        """Embeddings (N, D) of items; near-duplicates are close to each other."""
        ...


class Modality(ABC, Generic[D]):
    """One kind of data: how it is read, encoded, evaluated, written and shown.

    `spec` is always what the values of an item mean, as a JSON value: a colour mode, the columns of a table. It is
    stored in `model.json` and passed to every method that needs it, so a modality has no state.

    Attributes:
        name: The value of `--modality`, stored in `model.json`.
        codec_class: The codec; its constructor arguments (`codec_config`) are stored in `codec/config.json`.
        codec_share: Share of the training time for the first stage, if the codec has trainable weights.
        preview_items: Number of items in a preview during training.
        min_items: Minimum number of items per set that the evaluator compares.
        example_output: Example of an output path, for model cards and hints.
        jump_grid: Time grid of a few-step model.
        uses_texts: Whether a text condition of the data is a condition of the model.
    """

    name: ClassVar[str]
    codec_class: ClassVar[type[Codec]]
    codec_share: ClassVar[float]
    preview_items: ClassVar[int]
    min_items: ClassVar[int]
    example_output: ClassVar[str]
    jump_grid: ClassVar[str] = "data"
    uses_texts: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, source: str) -> bool:
        """Whether a source looks like this kind of data; decided from its name and the files there."""

    @abstractmethod
    def read(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[D, D | None]:
        """The items of a source: all, or a training part and the part that the source itself holds out.

        Args:
            source: A path or a name.
            settings: How to read it.
            spec: The spec of a model or of other data that the items are to be read by; None to infer it.

        Raises:
            UserError: What is wrong with the source, and what to do.
        """

    @abstractmethod
    def from_samples(self, items: Items, labels: Tensor | None, spec: Any, label_names: list[str]) -> D:
        """Generated items with labels (N,) as a data set, with the values that reading them back gives."""

    @abstractmethod
    def plan(self, given: Settings, context: PlanContext, seconds: float) -> Settings:
        """Default settings of this kind of data; what they leave None gets general defaults.

        `given` is what the user fixed, `seconds` the training time of the first stage.
        """

    @abstractmethod
    def codec_config(self, codec: CodecSettings, shape: tuple[int, ...], spec: Any) -> dict[str, Any]:
        """Constructor arguments of `codec_class`, as JSON values."""

    @abstractmethod
    def evaluator(
        self, train: D, device: str | None, progress: Progress | None, target_column: str | None
    ) -> Evaluator[D]:
        """The evaluator of samples, where `train` is the training part of the real data."""

    @abstractmethod
    def reconstruction_metrics(
        self, x: Items, x_hat: Items, spec: Any, features: Extractor | None = None
    ) -> dict[str, float]:
        """Reconstruction metrics of items x̂ against x; with features also distances of the two sets."""

    @abstractmethod
    def write(self, out: Path, items: Items, metadata: list[dict[str, Any]], spec: Any, overwrite: bool) -> None:
        """Write items so that `read` with this spec returns them.

        `metadata` is the label, seed, settings and origin of each item; a format without room for it leaves it out.
        """

    @abstractmethod
    def preview(self, items: Items, spec: Any, reconstructed: Items | None = None, columns: int | None = None) -> Any:
        """A picture (PIL) of items, or of originals beside their reconstructions.

        Args:
            items: The items.
            spec: What the values mean.
            reconstructed: Items to show beside them.
            columns: Items, or panels, per row.
        """

    @abstractmethod
    def contract_source(self, folder: Path) -> str:
        """Write a small source into `folder` and return its path; contract tests train on it within seconds."""

    @abstractmethod
    def check_output(self, out: Path, overwrite: bool) -> None:
        """Raise a UserError, before any work, if items cannot be written to a path."""

    def read_split(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[D, D]:
        """Training and held-out part of a source: its own parts, or else a deterministic split."""
        data, held = self.read(source, settings, spec)
        return split(data, settings.held_out) if held is None else (data, held)

    def check_compatible(self, name: str, shape: tuple[int, ...], spec: Any, source: object, data: D) -> None:
        """Raise a UserError if the items of a source are not like those of `name` (a model, or samples)."""
        if (shape, spec) != (data.shape, data.spec):
            raise UserError(f"{name}: its items are not like those of {source}", code=1)

    def check_complete(self, source: str, parts: Sequence[D], spec: Any) -> None:
        """Raise a UserError if an item lacks a value that every training item had, and so has no latent."""

    def is_builtin(self, source: str) -> bool:
        """Whether a source is the name of a data set that comes with this modality."""
        return False

    def label_values(self, names: Sequence[str]) -> list[Any]:
        """The label of each class as the data have it: an integer if the name is one."""
        return [int(name) if re.fullmatch(r"0|-?[1-9][0-9]*", name) else name for name in names]


class Maskable(ABC, Generic[D]):
    """Items have parts that `inpaint` can regenerate."""

    @abstractmethod
    def read_masks(self, path: Path | None, source: str, parts: Sequence[D], settings: DataSettings) -> Tensor:
        """The mask of each item, true where it is to be regenerated: bool (N, *axes of an item).

        Args:
            path: Mask file or folder, if the user named one.
            source: The source of the items.
            parts: The items, in consecutive parts.
            settings: How they were read.

        Raises:
            UserError: The masks are missing or do not fit the items.
        """

    def fill_writer(self, out: Path, source: str, spec: Any, overwrite: bool) -> Callable[[Items], None] | None:
        """A writer of the source with missing values filled in from items; None to `write` the items."""
        return None


class Animatable(ABC):
    """Items can be the frames of an animation."""

    @abstractmethod
    def animation(self, path: Path) -> Callable[[Items], None]:
        """A writer of items as frames of one file; raises a UserError for a format without frames."""


class Conditional(ABC):
    """Items have columns that `--where` and `--balance` can name."""

    @abstractmethod
    def strata(self, conditions: Sequence[str], balance: str | None, spec: Any) -> Strata:
        """The items that match conditions such as `age>=30`: one stratum, or one per category of a balanced column."""


class Labelable(ABC, Generic[D]):
    """Items have classes that `augment` can balance."""

    @abstractmethod
    def labeler(
        self,
        given: D,
        unlabelled: Sequence[D],
        names: Sequence[str],
        target_column: str | None,
        device: str | None,
        progress: Progress | None,
    ) -> Labeler:
        """A labeler trained on given items.

        Args:
            given: Labelled items, some perhaps without a label; labels are class numbers of the model.
            unlabelled: Further items without labels.
            names: The model's classes.
            target_column: Column of a table that holds the classes.
            device: Device to compute on; None for the best available.
            progress: Called with the stage, the number done and the total.
        """


class FeatureNetwork(Protocol):
    """A small classifier of the training data: its features measure distances, its logits give pseudo-labels."""

    head: nn.Linear

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits (B, classes) of items x (B, ...)."""
        ...

    def features(self, x: Tensor, /) -> Tensor:
        """Penultimate features (B, D) of items x (B, ...)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class FeatureLearner(ABC, Generic[D]):
    """A small network can be trained on the data, for perceptual and adversarial codec losses and pseudo-labels.

    Attributes:
        max_unlabelled: Maximum number of unlabelled items that the network is trained on.
    """

    max_unlabelled: ClassVar[int]

    @abstractmethod
    def supports_features(self, shape: tuple[int, ...]) -> bool:
        """Whether the network can be trained on items of this shape."""

    @abstractmethod
    def uses_features(self, codec: CodecSettings) -> bool:
        """Whether the perceptual loss compares the network's features."""

    @abstractmethod
    def check_features(self, codec: CodecSettings, shape: tuple[int, ...]) -> None:
        """Raise a UserError if the network cannot be trained on items of this shape."""

    @abstractmethod
    def build_features(self, shape: tuple[int, ...], classes: int, seed: int, device: torch.device) -> FeatureNetwork:
        """The network with random weights, frozen."""

    @abstractmethod
    def fit_features(
        self,
        data: D,
        classes: int,
        *,
        steps: int,
        seed: int,
        device: str,
        bf16: bool,
        max_unlabelled: int | None = None,
    ) -> FeatureNetwork:
        """The trained network, frozen.

        Args:
            data: Training items.
            classes: Number of classes; 0 without labels.
            steps: Optimizer steps.
            seed: Seed of weights and order.
            device: Device to compute on.
            bf16: Whether to train under bfloat16 autocast.
            max_unlabelled: Maximum number of unlabelled items; None for as many as `steps` steps see once.
        """

    @abstractmethod
    def restore_features(self, shape: tuple[int, ...], state: Mapping[str, Tensor], device: str) -> FeatureNetwork:
        """The network with saved weights, frozen."""

    @abstractmethod
    def perceptual_loss(self, codec: CodecSettings, network: FeatureNetwork | None) -> nn.Module | None:
        """(x̂, x) -> perceptual distance per item (B,); None without one."""

    @abstractmethod
    def discriminator(self, shape: tuple[int, ...]) -> nn.Module:
        """A new discriminator: items (B, ...) -> logits (B, ...), positive for real."""

    @abstractmethod
    def unlabelled_seen(self, steps: int) -> int:
        """Number of unlabelled items that are each seen once in this number of training steps."""

    @abstractmethod
    def comparison_seconds(self, count: int) -> float:
        """Estimated seconds to compare `count` items with each other, as label propagation does."""


@contextmanager
def report_stage(progress: Progress | None, name: str) -> Iterator[None]:
    """Report the start and the end of a stage."""
    report = progress or (lambda *_: None)
    report(name, 0, 1)
    yield
    report(name, 1, 1)
