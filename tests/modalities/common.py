"""What the contract tests share: a trained run per modality, and examples of tasks that only some modalities can do."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.config import DataSettings, Settings, read_settings
from sfumato.data.dataset import Dataset
from sfumato.errors import UserError
from sfumato.modalities.base import Animatable, Conditional, Labelable, Maskable, Modality
from sfumato.model import Model
from sfumato.sampling import new_conditions
from sfumato.types import Items, Latent, Raw

STEPS = 60  # of both stages together
OVERRIDES = (  # a small model, and nothing that depends on the machine
    *("train.precision=fp32", "codec.width=16", "codec.perceptual=none", "denoiser.width=64", "denoiser.depth=2"),
    *("train.codec.batch=16", "train.denoiser.batch=16"),
    *("sample.guidance=1.5", "sample.autoguidance=1", "sample.steps=4"),
)


@dataclass
class Example:
    """Arguments of tasks that need a mixin, which only a modality with it has."""

    mask: Tensor | None = None  # (H, W); of a modality whose sources mark what is missing, none
    where: tuple[str, ...] = ()
    balance: str | None = None
    augment: dict[str, Any] = field(default_factory=dict)


LEFT_HALF = torch.arange(8).expand(8, 8) < 4
EXAMPLES = {
    "image": Example(mask=LEFT_HALF, augment={"n": 26}),
    "table": Example(where=("colour=red",), balance="colour", augment={"target": "colour", "n": 140}),
    "waves": Example(),
    "strokes": Example(),
}
TASKS: dict[type, Callable[["Run", Path], Any]] = {
    Maskable: lambda run, folder: run.model.inpaint(run.source, mask=run.write_mask(folder), steps=2, resample=1),
    Animatable: lambda run, folder: run.model.interpolate("0", "1", n=3, animation=folder / "path.gif"),
    Conditional: lambda run, folder: run.model.generate(4, where=run.example.where or ("a=b",)),
    Labelable: lambda run, folder: run.model.augment(run.source, **run.example.augment),
}


class Run:
    """A small source of a modality, and a model that was trained on it for a moment."""

    def __init__(self, modality: Modality[Any], folder: Path) -> None:
        self.modality, self.folder, self.example = modality, folder / "run", EXAMPLES[modality.name]
        self.source = modality.contract_source(folder)
        self.train, self.held_out = modality.read_split(self.source, DataSettings())
        self.model = self.fit(self.folder)

    def fit(self, folder: Path, **options: Any) -> Model:
        """Train a model in `folder`."""
        return sfumato.fit(self.source, out=folder, steps=STEPS, overrides=OVERRIDES, device="cpu", **options)

    @property
    def spec(self) -> Any:
        return self.model.config.spec

    @cached_property
    def settings(self) -> Settings:
        """The plan of the run."""
        return read_settings(json.loads((self.folder / "run.json").read_text())["plan"])

    def write_mask(self, folder: Path) -> Path | None:
        """The example's mask as a picture."""
        if self.example.mask is None:
            return None
        Image.fromarray(self.example.mask.numpy()).save(folder / "mask.png")
        return folder / "mask.png"


def values(data: Dataset) -> Items:
    """All items of a data set."""
    batch = data.batch(range(len(data)))
    return Items.unpad(batch.data, batch.mask)


def equal(a: Items, b: Items) -> bool:
    """Whether items are the same, missing values included."""
    return len(a) == len(b) and all(map(equal_values, a, b))


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Whether values are the same, missing ones included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def have_shape(items: Items, shape: tuple[int, ...]) -> bool:
    """Whether items have a shape; of a list, which items of several lengths are, the first axis may be shorter."""
    if isinstance(items.data, Tensor):
        return items.data.shape[1:] == shape
    return all(len(item) <= shape[0] and item.shape[1:] == shape[1:] for item in items)


def finite(items: Items) -> bool:
    """Whether all values are finite or missing."""
    return all(bool((item.isfinite() | item.isnan()).all()) for item in items)


def rolled(items: Items) -> Items:
    """The items, the last one first."""
    return items.select([len(items) - 1, *range(len(items) - 1)])


def conditions(run: Run, items: Sequence[int]) -> Raw:
    """The conditions that `generate` gives each item."""
    return new_conditions(run.model.conditioner, items, 0)


def assert_equal(a: object, b: object) -> None:
    """The latents, or the values of conditions, are the same."""
    if isinstance(a, Latent) and isinstance(b, Latent):
        assert_equal(a.z, b.z)
        assert_equal(a.mask, b.mask)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        assert equal_values(a, b)
    else:
        assert a == b


@contextmanager
def refused(match: str = ".") -> Iterator[None]:
    """The block raises a UserError of one line."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
