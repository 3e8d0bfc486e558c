"""The conditions of a source's items: which of a model's they are, and how they are recorded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.config import DataSettings
from sfumato.data.conditions import Known, Labels, Numbers, Texts
from sfumato.errors import UserError
from sfumato.modalities.base import Modality
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.model import Model
from sfumato.tasks.inputs import SourceItems, item_conditions, item_metadata, map_items, output_metadata, read_parts
from sfumato.types import UNKNOWN, Batch, Items, Raw


def images(count: int, **conditions: Known) -> ImageDataset:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    return ImageDataset(pixels, "L", conditions=conditions, names=[f"{i}.png" for i in range(count)])


def source(*parts: ImageDataset) -> SourceItems:
    return SourceItems("in", list(parts), DataSettings())


def labels(*names: str | None) -> Labels:
    return Labels.from_values(names)


def numbers(*values: float) -> Numbers:
    return Numbers(np.array(values, np.float32))


def listed(raw: Raw) -> dict[str, list[Any]]:
    return {
        name: values.tolist() if isinstance(values, torch.Tensor) else [*values] for name, values in raw.values.items()
    }


def test_conditions_are_matched_by_name_and_kind(portraits: Model):
    data = images(3, style=labels("bold", None, "plain"), digit=labels("7", "3", "3"), age=numbers(20, np.nan, 30))
    originals = source(data, images(1, text=Texts(["a dot"]), hue=labels("red")))
    raw = originals.raw(portraits)
    torch.testing.assert_close(raw.values["age"], torch.tensor([20, np.nan, 30, np.nan]), equal_nan=True)
    assert listed(raw.only(["digit", "style"])) == {"digit": [7, 3, 3, UNKNOWN], "style": [1, UNKNOWN, 0, UNKNOWN]}
    assert set(source(images(2, age=labels("old", "young"), digit=numbers(1, 2))).raw(portraits).values) == set()
    few = source(images(3, age=labels("30", None, "3.5")))  # few integers look like classes
    torch.testing.assert_close(few.raw(portraits).values["age"], torch.tensor([30, np.nan, 3.5]), equal_nan=True)


def test_the_primary_label_may_have_another_name(portraits: Model, model: Model):
    assert listed(source(images(2, label=labels("7", "3"))).raw(portraits)) == {"digit": [7, 3]}
    assert listed(source(images(2, digit=labels("7", "3"))).raw(model)) == {"label": [7, 3]}
    both = images(2, label=labels("7", "3"), digit=labels("1", "2"))
    assert listed(source(both).raw(portraits)) == {"digit": [1, 2]}
    assert listed(source(both).raw(model)) == {"label": [7, 3]}
    assert listed(source(images(2, style=labels("bold", "plain"))).raw(portraits)) == {"style": [1, 0]}
    assert listed(source(images(2, label=labels("cat", "dog"))).raw(portraits)) == {}  # the model knows no such digits
    with pytest.raises(UserError, match="label 'cat' is unknown to the model: it knows 0, 1"):
        source(images(2, label=labels("cat", "7"))).raw(model)


def test_given_conditions_replace_those_of_the_source(portraits: Model, model: Model, make_model: Callable[..., Model]):
    data = source(images(2, digit=labels("7", "3"), style=labels("bold", None)))
    raw = item_conditions(portraits, ["style=plain", "age=30"], data)
    assert listed(raw) == {"digit": [7, 3], "style": [0, 0], "age": [30.0, 30.0]}
    assert listed(item_conditions(portraits, "5", data)) == {"digit": [5, 5], "style": [1, UNKNOWN]}
    for nothing in (None, ()):
        assert listed(item_conditions(portraits, nothing, data)) == {"digit": [7, 3], "style": [1, UNKNOWN]}
    unknown = source(images(2, label=labels("cat", "dog")))
    assert listed(item_conditions(model, "5", unknown)) == {"label": [5, 5]}  # whatever the source's classes
    assert not item_conditions(make_model(0), None, unknown)
    with pytest.raises(UserError, match="trained without labels"):
        item_conditions(make_model(0), "5", unknown)


def test_new_conditions_replace_old_ones_in_the_metadata(portraits: Model, model: Model):
    data = source(images(3, digit=labels("7", "3", None), style=labels("bold", "plain", "plain"), age=numbers(1, 2, 3)))
    raw = Raw({"digit": torch.tensor([3, 3, 3]), "style": torch.tensor([1, 1, -1]), "age": torch.tensor([1, 2.5, 3])})
    assert output_metadata(portraits, data, raw, {"seed": 0}) == [
        {"source": "0.png", "digit": 3, "source_digit": 7, "style": "bold", "age": 1.0, "seed": 0},
        {
            **{"source": "1.png", "digit": 3, "source_digit": 3, "style": "bold", "source_style": "plain"},
            **{"age": 2.5, "source_age": 2.0, "seed": 0},
        },
        {"source": "2.png", "digit": 3, "style": "plain", "age": 3.0, "seed": 0},
    ]
    unchanged = [{"digit": 7, "style": "bold", "age": 1.0}, {"digit": 3, "style": "plain", "age": 2.0}]
    assert [output_metadata(portraits, data, None, {})[i] for i in (0, 1)] == [
        {"source": f"{i}.png", **row} for i, row in enumerate(unchanged)
    ]
    named = source(images(1, label=labels("7")))
    assert output_metadata(portraits, named, Raw({"digit": torch.tensor([3])}), {}) == [
        {"source": "0.png", "digit": 3, "source_digit": 7}
    ]
    assert output_metadata(portraits, named, Raw({"style": torch.tensor([1])}), {}) == [
        {"source": "0.png", "label": 7, "style": "bold"}
    ]
    assert output_metadata(model, named, Raw({"label": torch.tensor([3])}), {}) == [
        {"source": "0.png", "label": 3, "source_label": 7}
    ]


def test_items_are_recorded_with_what_is_known_of_them(model: Model):
    data = images(2, text=Texts(["a dot", None]), age=numbers(np.nan, 1 / 3), label=labels("cat", "07"))
    assert item_metadata(model.modality, data, [0, 1]) == [
        {"source": "0.png", "text": "a dot", "label": "cat"},
        {"source": "1.png", "age": 0.333333, "label": "07"},
    ]


def test_items_are_taken_from_all_parts(model: Model):
    originals = source(images(3), images(2))
    taken = originals.take([1, 2, 3, 4]).stack()
    assert torch.equal(taken, torch.cat([originals.parts[0].batch([1, 2]).data, originals.parts[1].batch([0, 1]).data]))
    seen: list[list[int]] = []

    def double(index: list[int], x: Items) -> Items:
        seen.append(index)
        return Items(2 * x.stack())

    doubled = map_items(model, originals, double, 2, "double", None).stack()
    assert torch.equal(doubled, 2 * originals.take(range(5)).stack()) and seen == [[0, 1], [2, 3], [4]]


def test_items_of_several_lengths_are_mapped(model: Model, monkeypatch: pytest.MonkeyPatch):
    mask = torch.arange(4) < torch.tensor([[2], [4], [1]])
    padded = torch.arange(12.0).view(3, 4) * mask
    data = images(3)
    monkeypatch.setattr(data, "batch", lambda index: Batch(padded[index], torch.tensor(index), Raw(), mask[index]))
    mapped = map_items(model, source(data), lambda _, x: Items([item + 1 for item in x]), 2, "add", None)
    assert [item.tolist() for item in mapped] == [[1, 2], [5, 6, 7, 8], [9]]


def test_a_source_need_not_have_the_columns_of_the_training_data(sound: Modality[Any], monkeypatch: pytest.MonkeyPatch):
    columns: list[tuple[str, ...]] = []

    def read(name: str, settings: DataSettings, spec: Any) -> tuple[ImageDataset, None]:
        columns.append(tuple(settings.label_column))
        if settings.label_column or name == "nowhere":
            raise UserError(f"{name}: no column 'digit'")
        return images(2), None

    monkeypatch.setattr(sound, "read", read, raising=False)
    settings = DataSettings(label_column=("digit",))
    assert len(read_parts(sound, "in", settings, (), "L")[0]) == 2 and columns == [("digit",), ()]
    for name, given, overrides in (("in", settings, ["data.label_column=digit"]), ("nowhere", DataSettings(), ())):
        with pytest.raises(UserError, match="no column 'digit'"):
            read_parts(sound, name, given, overrides, "L")
