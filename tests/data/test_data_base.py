"""Batches, subsets, fingerprints and the split."""

import time

import numpy as np
import pytest
import torch

from sfumato.data import Data, split
from sfumato.data.base import permutation


def some(count: int = 40, classes: int = 4, mode: str = "RGB") -> Data:
    rng = np.random.default_rng(0)
    dtype, high = (np.uint16, 65536) if mode == "I;16" else (np.uint8, 256)
    channels = {"L": 1, "I;16": 1, "RGB": 3, "RGBA": 4}[mode]
    store = rng.integers(0, high, (count, 5, 7, channels)).astype(dtype)
    labels = np.arange(count) % classes
    return Data(store, mode, None, labels, [str(k) for k in range(classes)], [f"text {i}" for i in range(count)])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_batch_is_exact(mode: str) -> None:
    data = some(mode=mode)
    top = 65535 if mode == "I;16" else 255
    data.store[3, 0, 0, 0], data.store[3, 0, 1, 0] = 0, top
    batch = data.batch([3, 1])
    assert batch.data.shape == (2, *data.shape) and batch.data.dtype == torch.float32
    assert batch.data[0, 0, 0, 0] == -1 and batch.data[0, 0, 0, 1] == 1
    back = ((batch.data.double() + 1) * top / 2).round().numpy().transpose(0, 2, 3, 1)
    assert (back == data.store[[3, 1]]).all()
    assert batch.label is not None and batch.label.tolist() == [3, 1] and batch.label.dtype == torch.int64
    assert batch.text == ["text 3", "text 1"] and batch.index.tolist() == [3, 1]


def test_batch_takes_any_index() -> None:
    data = some()
    for index in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        assert torch.equal(data.batch(index).data, data.batch([2, 0]).data)


def test_batch_of_512_takes_less_than_a_millisecond_or_three() -> None:
    store = np.zeros((2000, 28, 28, 1), np.uint8)
    data = Data(store, "L")
    index = np.random.default_rng(0).integers(0, 2000, 512)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        data.batch(index)
        times.append(time.perf_counter() - start)
    assert min(times) < 3e-3  # 0.2 ms on a quiet machine


def test_subset_shares_pixels_and_keeps_everything() -> None:
    data = some()
    part = data.subset([5, 9, 2]).subset([2, 0])
    assert part.store is data.store and len(part) == 2
    assert (part.pixels == data.store[[2, 5]]).all()
    assert torch.equal(part.batch([1]).data, data.batch([5]).data)
    assert part.captions == ["text 2", "text 5"] and part.labels is not None and part.labels.tolist() == [2, 1]


def test_fingerprint_is_of_the_content() -> None:
    first, same = some(), some()
    assert first.fingerprint == same.fingerprint and len(first.fingerprint) == 64
    other = some()
    other.store[-1, -1, -1, -1] ^= 1
    renamed = some()
    renamed.captions = ["x"] * 40
    relabelled = some()
    relabelled.labels = np.zeros(40, np.int64)
    prints = {d.fingerprint for d in (first, other, renamed, relabelled, first.subset(range(39)))}
    assert len(prints) == 5


def splitmix64(seed: int, i: int) -> int:
    """The i-th output of the generator, as its authors write it."""
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_permutation_is_pinned() -> None:
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the published first value
    for seed in (0, 7, 2**63 + 5):
        assert permutation(500, seed).tolist() == sorted(range(500), key=lambda i: splitmix64(seed, i))
    assert permutation(10, 1).tolist() != permutation(10, 0).tolist()


def test_split_is_disjoint_deterministic_and_by_class() -> None:
    data = some(400, 4)
    data.names = [str(i) for i in range(400)]
    train, held = split(data)
    assert len(held) == 40 and not set(train.names or ()) & set(held.names or ())
    assert held.labels is not None and np.bincount(held.labels).tolist() == [10, 10, 10, 10]
    assert split(data)[1].names == held.names
    assert split(some(400, 5))[1].fingerprint != held.fingerprint


def test_split_of_uneven_classes_leaves_one_of_each_to_learn() -> None:
    data = some(20, 2)
    data.labels = np.array([0] * 17 + [1, 1, 2])
    train, held = split(data, fraction=0.5)
    assert len(held) == 10 and train.labels is not None and set(train.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("count", [2, 3, 9])
def test_split_holds_out_at_least_one(count: int) -> None:
    data = some(count, count)
    train, held = split(data)
    assert len(held) == 1 and len(train) == count - 1


def test_split_is_capped() -> None:
    data = Data(np.zeros((300, 2, 2, 1), np.uint8), "L")
    assert len(split(data, 0.5, cap=20)[1]) == 20


@pytest.mark.parametrize("classes", [1, 7, 90])
def test_split_of_many_classes(classes: int) -> None:
    """Of each class the first ones in the order of the shuffle, as many as its share."""
    labels = np.random.default_rng(1).integers(0, classes, 300)
    names = [str(k) for k in range(classes)]
    data = Data(np.zeros((300, 1, 1, 1), np.uint8), "L", None, labels, names)
    order = permutation(300, int(data.fingerprint[:16], 16))
    for fraction in (0.05, 0.3, 0.9):
        held = split(data, fraction)[1]
        assert held.rows is not None and held.labels is not None
        counts, sizes = np.bincount(held.labels, minlength=classes), np.bincount(labels, minlength=classes)
        assert counts.sum() <= round(300 * fraction) and (counts <= np.maximum(sizes - 1, 0)).all()
        fair = np.minimum(np.floor(sizes * round(300 * fraction) / 300), np.maximum(sizes - 1, 0))
        assert ((counts == fair) | (counts == fair + 1)).all()
        first = [k for c in range(classes) for k in order[labels[order] == c][: counts[c]]]
        assert held.rows.tolist() == sorted(first)
