"""Batches, subsets and fingerprints of images."""

import time

import numpy as np
import pytest
import torch

from sfumato.data.conditions import Labels, Numbers, Texts
from sfumato.data.dataset import split
from sfumato.modalities.image.dataset import ConcatDataset, ImageDataset
from sfumato.types import UNKNOWN


def random_images(count: int = 40, classes: int = 4, mode: str = "RGB") -> ImageDataset:
    """Noise with labels and captions."""
    rng = np.random.default_rng(0)
    dtype, high = (np.uint16, 65536) if mode == "I;16" else (np.uint8, 256)
    channels = {"L": 1, "I;16": 1, "RGB": 3, "RGBA": 4}[mode]
    store = rng.integers(0, high, (count, 5, 7, channels)).astype(dtype)
    labels = Labels(np.arange(count) % classes, [str(k) for k in range(classes)])
    texts = Texts([f"text {i}" for i in range(count)])
    return ImageDataset(store, mode, conditions={"label": labels, "text": texts})


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_batch_is_exact(mode: str) -> None:
    data = random_images(mode=mode)
    maximum = 65535 if mode == "I;16" else 255
    data.store[3, 0, 0, 0], data.store[3, 0, 1, 0] = 0, maximum
    batch = data.batch([3, 1])
    assert batch.data.shape == (2, *data.shape) and batch.data.dtype == torch.float32
    assert batch.data[0, 0, 0, 0] == -1 and batch.data[0, 0, 0, 1] == 1
    pixels = ((batch.data.double() + 1) * maximum / 2).round().numpy().transpose(0, 2, 3, 1)
    assert (pixels == data.store[[3, 1]]).all()
    label = batch.raw.values["label"]
    assert isinstance(label, torch.Tensor) and label.tolist() == [3, 1] and label.dtype == torch.int64
    assert batch.raw.values["text"] == ["text 3", "text 1"] and batch.index.tolist() == [3, 1] and batch.mask is None


def test_batch_takes_any_kind_of_index() -> None:
    data = random_images()
    for index in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        assert torch.equal(data.batch(index).data, data.batch([2, 0]).data)


def test_batch_of_512_takes_less_than_three_milliseconds() -> None:
    store = np.zeros((2000, 28, 28, 1), np.uint8)
    data = ImageDataset(store, "L")
    index = np.random.default_rng(0).integers(0, 2000, 512)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        data.batch(index)
        times.append(time.perf_counter() - start)
    assert min(times) < 3e-3  # 0.2 ms on an idle machine


def test_subset_shares_pixels_and_keeps_conditions() -> None:
    data = random_images()
    data.names = [f"{i}.png" for i in range(40)]
    data.conditions["age"] = Numbers(np.arange(40, dtype=np.float32))
    part = data.subset([5, 9, 2]).subset([2, 0])
    assert part.store is data.store and len(part) == 2
    assert (part.pixels == data.store[[2, 5]]).all()
    assert torch.equal(part.batch([1]).data, data.batch([5]).data)
    assert part.captions == ["text 2", "text 5"] and part.labels is not None and part.labels.tolist() == [2, 1]
    age = part.batch([1, 0]).raw.values["age"]
    assert isinstance(age, torch.Tensor) and age.tolist() == [5, 2] and age.dtype == torch.float32
    assert part.names == ["2.png", "5.png"]


def test_fingerprint_depends_on_the_content() -> None:
    first, same = random_images(), random_images()
    assert first.fingerprint == same.fingerprint and len(first.fingerprint) == 64
    changed = random_images()
    changed.store[-1, -1, -1, -1] ^= 1
    recaptioned = random_images()
    recaptioned.conditions["text"] = Texts(["x"] * 40)
    relabelled = random_images().relabel(np.zeros(40, np.int64), ["0", "1", "2", "3"], [])
    aged, older, renamed, styled = (random_images() for _ in range(4))
    aged.conditions["age"] = Numbers(np.zeros(40, np.float32))
    older.conditions["age"] = Numbers(np.ones(40, np.float32))
    renamed.conditions["year"] = Numbers(np.zeros(40, np.float32))
    styled.conditions["style"] = Labels(np.zeros(40, np.int64), ["a"])
    different = (first, changed, recaptioned, relabelled, first.subset(range(39)), aged, older, renamed, styled)
    assert len({data.fingerprint for data in different}) == 9


# fingerprint, that of a subset, and the held-out rows before data sets had several conditions: cached latents and
# splits of the data of that time must stay valid
LABELS, TEXTS = (
    [0, 1, 2, 0, UNKNOWN, *(i % 3 for i in range(5, 12))],
    [f"text {i}" if i != 2 else None for i in range(12)],
)
FINGERPRINTS = [
    ("", "bc6475be54ee98d4", "a82059d25c98e476", [0, 2, 6, 11]),
    ("label", "6b48e7793c0f3843", "111f098961ba142f", [6, 7, 9, 11]),
    ("text", "5a4fa5b49f3c1c9b", "aa5e8736e13edaea", [1, 3, 6, 8]),
    ("label text", "5d726c2d063ed34a", "a620324a27629d77", [0, 1, 6, 8]),
]


@pytest.mark.parametrize(("names", "whole", "part", "held_out"), FINGERPRINTS)
def test_fingerprints_of_one_label_and_captions_stay(names: str, whole: str, part: str, held_out: list[int]) -> None:
    store = (np.arange(12 * 5 * 7 * 3) % 251).astype(np.uint8).reshape(12, 5, 7, 3)
    known = {"label": Labels(np.array(LABELS), ["a", "b", "c"]), "text": Texts(TEXTS)}
    data = ImageDataset(store, "RGB", conditions={name: known[name] for name in names.split()})
    assert data.fingerprint[:16] == whole and data.subset([3, 1]).fingerprint[:16] == part
    held = split(data, 0.3)[1]
    assert held.rows is not None and held.rows.tolist() == held_out


def test_concatenated_data_sets_have_the_primary_label_alone() -> None:
    first, second = random_images(6), random_images(4).relabel(None, [], [])
    first.conditions["style"] = Labels(np.zeros(6, np.int64), ["a"])
    both = ConcatDataset([first, second])
    batch = both.batch([9, 1])
    assert list(batch.raw.values) == ["label"] and batch.raw.values["label"].tolist() == [UNKNOWN, 1]
    assert torch.equal(batch.data, torch.stack([second.batch([3]).data[0], first.batch([1]).data[0]]))
    assert both.labels is not None and both.labels.tolist() == [0, 1, 2, 3, 0, 1, *[UNKNOWN] * 4]
