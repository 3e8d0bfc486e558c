"""What a row of the table of modalities holds: everything that is particular to one kind of data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from sfumato.codecs import Codec
from sfumato.config import CodecSettings, DataSettings, Settings
from sfumato.metrics import Copies, Extractor

Progress = Callable[[str, int, int], None]
D = TypeVar("D")  # the data set: what `len`, `batch`, `subset` and the rest are asked of
D_contra = TypeVar("D_contra", contravariant=True)


@dataclass(frozen=True)
class Facts:
    """What a plan knows of the data and the machine.

    Args:
        shape: Shape of an item.
        mode: How its numbers are meant, as JSON can hold it.
        count: Training items.
        classes: Number of classes; 0 without labels.
        precision: `bf16` or `fp32`.
        pace: (stage, settings) -> items per second that training so planned gets through, measured; None where the
            plan must not depend on the machine.
    """

    shape: tuple[int, ...]
    mode: Any
    count: int
    classes: int
    precision: str
    pace: Callable[[str, Settings], float] | None = None


@dataclass(frozen=True)
class Kinds:
    """The kinds of items that are asked for.

    Args:
        names: What each is called.
        sort: Items (N, ...) -> the kind of each (N,), -1 where it is none of them.
        known: What is known of an item of each kind (kinds, ...), NaN where nothing is.
    """

    names: list[str]
    sort: Callable[[Tensor], Tensor]
    known: Tensor


class Judge(Protocol[D_contra]):
    """What measures samples against one source.

    Attributes:
        by_label: Whether `cas` is about the items' labels, which both sets must have.
    """

    by_label: bool

    def report(self, fake: D_contra, held: D_contra, cas: bool, seed: int) -> dict[str, Any]:
        """Numbers about samples, each beside its floor, what real held-out items score; `memorised` among them."""
        ...

    def compare(self, x: Tensor, x_hat: Tensor) -> dict[str, float]:
        """How close reconstructions are to their originals."""
        ...


class Sorter(Protocol):
    """What tells whether made items belong into a labelled set beside given ones.

    Attributes:
        names: The classes.
        labels: Class number of each given item (N,), `UNKNOWN` where it has none.
        asked: Whether the model makes items of a class it is asked for; otherwise they are taken as they come.
        copies: What tells copies among points.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def asked(self) -> bool: ...

    @cached_property
    def copies(self) -> Copies: ...

    def shown(self, items: Tensor) -> Tensor:
        """The class that each item (N, ...) shows, `UNKNOWN` where none is plausible: (N,)."""
        ...

    def guessed(self, items: Tensor) -> Tensor:
        """The class of items without a label (N, ...), `UNKNOWN` where it is not sure enough: (N,)."""
        ...

    def points(self, items: Tensor) -> Tensor:
        """Items (N, ...) as points (N, D) whose distances mean something."""
        ...


@dataclass(frozen=True)
class Modality(Generic[D]):
    """One row.

    Args:
        name: As in `--modality`.
        recognises: Whether a source looks like this kind.
        read: (source, data settings, mode or None) -> (training part, held-out part); a mode says how the numbers of a
            model or of other data are meant, where that is not plain from the source.
        parts: The same -> everything there is, and what the source itself holds out if it does.
        made: (items (N, ...), labels (N,) or None, mode, label names) -> the same as they would be read back.
        plan: (what the user fixed, facts, seconds of the first stage) -> what this kind of data wants.
        codec_share: Share of the training time that the first stage gets, where the codec has anything to learn.
        codec: The codec's class; its constructor's arguments are stored in `codec/config.json`.
        codec_options: (settings of the codec, shape, mode) -> those arguments.
        judge: (training part, device, progress, what --column says) -> who measures samples.
        compare: (x, x̂, mode, features or None) -> how close reconstructions are.
        kinds: (what the user typed after --where, and after --balance if anything, mode) -> what is asked for.
        check_fit: (name, shape, mode, source, data) -> refuses data of another kind than `name` makes.
        check_target: (where, overwrite) -> refuses a place that items cannot be written to.
        write: (where, items (N, ...), a row of facts per item, mode, overwrite) -> the files.
        sheet: (items (N, ...), mode, columns or None) -> a picture to look at.
        pairs: (x, x̂, mode) -> a picture of originals beside their reconstructions.
        masks: (mask file or folder if there is one, source, its parts, data settings) -> (N, *axes of an item) bool,
            true where an item is to be made anew. None: items have no parts that could be.
        fill: (where, source, mode, overwrite) -> what writes the source once more, with items (N, ...) for what is
            missing in it; refuses a place where that cannot be. None: items are written as new ones are.
        check_whole: (source, its parts, mode) -> refuses items that lack what all those of the training had, and so
            have no latent of their own. None: every item has one.
        animation: File -> what writes items (N, ...) into it, one after the other. None: they cannot be shown so.
        sorter: (given items, whose labels are class numbers of the model; items without labels; the model's classes;
            column of the classes or None; device; progress) -> who sorts made items into classes. None: there are none.
        shown: Items that a sheet takes while training.
        fewest: Items of each set without which two sets cannot be compared.
        example: What new items could be written to.
        jump_grid: Time grid of a few-step model's jumps.
    """

    name: str
    recognises: Callable[[str], bool]
    read: Callable[[str, DataSettings, Any], tuple[D, D]]
    parts: Callable[[str, DataSettings, Any], tuple[D, D | None]]
    made: Callable[[Tensor, Tensor | None, Any, list[str]], D]
    plan: Callable[[Settings, Facts, float], Settings]
    codec_share: float
    codec: Callable[..., Codec]
    codec_options: Callable[[CodecSettings, tuple[int, ...], Any], dict[str, Any]]
    judge: Callable[[D, str | None, Progress | None, str | None], Judge[D]]
    compare: Callable[[Tensor, Tensor, Any, Extractor | None], dict[str, float]]
    kinds: Callable[[Sequence[str], str | None, Any], Kinds]
    check_fit: Callable[[str, tuple[int, ...], Any, object, D], None]
    check_target: Callable[[Path, bool], None]
    write: Callable[[Path, Tensor, list[dict[str, Any]], Any, bool], None]
    sheet: Callable[[Tensor, Any, int | None], Any]
    pairs: Callable[[Tensor, Tensor, Any], Any]
    shown: int
    fewest: int
    example: str
    masks: Callable[[Path | None, str, Sequence[D], DataSettings], Tensor] | None = None
    fill: Callable[[Path, str, Any, bool], Callable[[Tensor], None]] | None = None
    check_whole: Callable[[str, Sequence[D], Any], None] | None = None
    animation: Callable[[Path], Callable[[Tensor], None]] | None = None
    sorter: Callable[[D, Sequence[D], Sequence[str], str | None, str | None, Progress | None], Sorter] | None = None
    jump_grid: str = "late"
