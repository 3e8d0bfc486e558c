"""The deterministic split and its permutation; labels and captions among the conditions."""

from dataclasses import replace

import numpy as np
import pytest

from sfumato.data.conditions import Labels, Numbers, Texts
from sfumato.data.dataset import Unlabelled, permutation, split
from sfumato.modalities.image.dataset import ImageDataset


def random_images(count: int, classes: int) -> ImageDataset:
    """Noise with labels."""
    store = np.random.default_rng(0).integers(0, 256, (count, 5, 7, 3)).astype(np.uint8)
    return ImageDataset(store, "RGB", conditions={"label": labels_of(np.arange(count) % classes, classes)})


def labels_of(numbers: np.ndarray, classes: int) -> Labels:
    return Labels(numbers, [str(k) for k in range(classes)])


def splitmix64(seed: int, i: int) -> int:
    """The i-th output of the generator, as its authors wrote it."""
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_permutation_is_splitmix64() -> None:
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the published first value
    for seed in (0, 7, 2**63 + 5):
        assert permutation(500, seed).tolist() == sorted(range(500), key=lambda i: splitmix64(seed, i))
    assert permutation(10, 1).tolist() != permutation(10, 0).tolist()


def test_split_is_disjoint_deterministic_and_stratified() -> None:
    data = random_images(400, 4)
    data.names = [str(i) for i in range(400)]
    train, held = split(data)
    assert len(held) == 40 and not set(train.names or ()) & set(held.names or ())
    assert held.labels is not None and np.bincount(held.labels).tolist() == [10, 10, 10, 10]
    assert split(data)[1].names == held.names
    assert split(random_images(400, 5))[1].fingerprint != held.fingerprint


def test_split_keeps_one_item_of_each_class_for_training() -> None:
    data = random_images(20, 2)
    data = data.relabel(np.array([0] * 17 + [1, 1, 2]), ["a", "b", "c"], [])
    train, held = split(data, fraction=0.5)
    assert len(held) == 10 and train.labels is not None and set(train.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("count", [2, 3, 9])
def test_split_holds_out_at_least_one(count: int) -> None:
    data = random_images(count, count)
    train, held = split(data)
    assert len(held) == 1 and len(train) == count - 1


def test_split_is_capped() -> None:
    data = ImageDataset(np.zeros((300, 2, 2, 1), np.uint8), "L")
    assert len(split(data, 0.5, cap=20)[1]) == 20


@pytest.mark.parametrize("classes", [1, 7, 90])
def test_split_is_proportional_to_classes(classes: int) -> None:
    """The first items of each class in the shuffled order, as many as its share."""
    labels = np.random.default_rng(1).integers(0, classes, 300)
    store = np.zeros((300, 1, 1, 1), np.uint8)
    data = ImageDataset(store, "L", conditions={"label": labels_of(labels, classes)})
    order = permutation(300, int(data.fingerprint[:16], 16))
    for fraction in (0.05, 0.3, 0.9):
        held = split(data, fraction)[1]
        assert held.rows is not None and held.labels is not None
        counts, sizes = np.bincount(held.labels, minlength=classes), np.bincount(labels, minlength=classes)
        assert counts.sum() <= round(300 * fraction) and (counts <= np.maximum(sizes - 1, 0)).all()
        expected = np.minimum(np.floor(sizes * round(300 * fraction) / 300), np.maximum(sizes - 1, 0))
        assert ((counts == expected) | (counts == expected + 1)).all()
        first = [k for c in range(classes) for k in order[labels[order] == c][: counts[c]]]
        assert held.rows.tolist() == sorted(first)


def test_split_is_stratified_by_the_primary_label() -> None:
    data, numbers = random_images(400, 4), np.arange(400) // 100
    part = split(replace(data, conditions={"style": labels_of(numbers, 4), **data.conditions}))[1]
    assert part.labels is not None and np.bincount(part.labels).tolist() == [10, 10, 10, 10]
    part = split(replace(data, conditions={"style": labels_of(numbers, 4)}))[1]
    assert part.rows is not None and np.bincount(numbers[part.rows]).tolist() == [10, 10, 10, 10]


def test_labels_and_captions_are_read_off_the_conditions() -> None:
    data = random_images(8, 2)
    style, age = Labels(np.array([0, 1, 2, -1] * 2), ["x", "y", "z"]), Numbers(np.arange(8, dtype=np.float32))
    texts = Texts([None, *"abcdefg"])
    several = replace(data, conditions={"style": style, "age": age, "text": texts})
    assert several.labels is style.numbers and several.label_names == ["x", "y", "z"] and several.classes == 3
    assert several.labelled and several.captions is texts.texts and list(several.further_conditions) == ["age"]
    assert several.describe() == ["conditions: style (3 classes), age (numbers from 0 to 7), text (texts)"]
    named = replace(data, conditions={**several.conditions, **data.conditions})
    assert named.label_names == ["0", "1"] and list(named.further_conditions) == ["style", "age"]
    raw = several.raw([3, 0])
    assert raw.values["style"].tolist() == [-1, 0] and raw.values["age"].tolist() == [3, 0]  # type: ignore[union-attr]
    assert raw.values["text"] == ["c", None]
    bare = replace(data, conditions={"age": age})
    assert bare.labels is None and bare.label_names == [] and bare.classes == 0 and not bare.labelled
    assert bare.captions is None and bare.describe() == [] and data.describe() == []
    unknown = replace(data, conditions={"label": Labels(np.full(8, -1), ["a"])})
    assert unknown.labels is not None and not unknown.labelled and unknown.classes == 0


def test_relabel_replaces_the_primary_label_alone() -> None:
    data = random_images(8, 2)
    style, age = Labels(np.zeros(8, np.int64), ["x"]), Numbers(np.zeros(8, np.float32))
    data = replace(data, conditions={"style": style, "age": age, **data.conditions})
    changed = data.relabel(np.full(8, 1), ["a", "b"], ["note"])
    assert changed.labels is not None and changed.labels.tolist() == [1] * 8 and changed.label_names == ["a", "b"]
    assert changed.notes == ["note"] and changed.conditions["style"] is style and changed.conditions["age"] is age
    assert list(changed.conditions) == list(data.conditions) and changed.fingerprint != data.fingerprint
    without = data.relabel(None, [], [])
    assert without.labels is None and list(without.conditions) == ["age"]  # no other label takes its place
    assert list(without.relabel(np.full(8, 0), ["a"], []).conditions) == ["age", "label"]
    assert data.labels is not None and data.labels.tolist() == [0, 1] * 4


def test_a_data_set_without_conditions() -> None:
    data = Unlabelled()
    assert data.labels is data.captions is data.names is None and len(data.conditions) == len(data.label_names) == 0
    assert data.relabel(None, ["a"], []) is data
