"""Batches, subsets and fingerprints of images."""

import time

import numpy as np
import pytest
import torch

from sfumato.modalities.image.dataset import ImageDataset


def random_images(count: int = 40, classes: int = 4, mode: str = "RGB") -> ImageDataset:
    """Noise with labels and captions."""
    rng = np.random.default_rng(0)
    dtype, high = (np.uint16, 65536) if mode == "I;16" else (np.uint8, 256)
    channels = {"L": 1, "I;16": 1, "RGB": 3, "RGBA": 4}[mode]
    store = rng.integers(0, high, (count, 5, 7, channels)).astype(dtype)
    labels = np.arange(count) % classes
    return ImageDataset(
        store, mode, None, labels, [str(k) for k in range(classes)], [f"text {i}" for i in range(count)]
    )


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
    assert batch.label is not None and batch.label.tolist() == [3, 1] and batch.label.dtype == torch.int64
    assert batch.text == ["text 3", "text 1"] and batch.index.tolist() == [3, 1]


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


def test_subset_shares_pixels_and_keeps_labels_and_captions() -> None:
    data = random_images()
    part = data.subset([5, 9, 2]).subset([2, 0])
    assert part.store is data.store and len(part) == 2
    assert (part.pixels == data.store[[2, 5]]).all()
    assert torch.equal(part.batch([1]).data, data.batch([5]).data)
    assert part.captions == ["text 2", "text 5"] and part.labels is not None and part.labels.tolist() == [2, 1]


def test_fingerprint_depends_on_the_content() -> None:
    first, same = random_images(), random_images()
    assert first.fingerprint == same.fingerprint and len(first.fingerprint) == 64
    changed = random_images()
    changed.store[-1, -1, -1, -1] ^= 1
    recaptioned = random_images()
    recaptioned.captions = ["x"] * 40
    relabelled = random_images()
    relabelled.labels = np.zeros(40, np.int64)
    fingerprints = {d.fingerprint for d in (first, changed, recaptioned, relabelled, first.subset(range(39)))}
    assert len(fingerprints) == 5
