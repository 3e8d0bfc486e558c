"""Built-in data sets; the real ones if $SFUMATO_DATA has them."""

import gzip
import hashlib
import io
import os
import tarfile
import time
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sfumato.data import cache_root
from sfumato.errors import UserError
from sfumato.modalities.image import builtin
from sfumato.modalities.image.builtin import BUILTINS
from sfumato.modalities.image.read import read_source

REAL = Path(os.environ.get("SFUMATO_DATA", "absent"))


def test_digits_are_read() -> None:
    train, held = read_source("digits")
    assert len(train) + len(held) == 1797 and train.shape == (1, 8, 8) and train.mode == "L"
    assert train.label_names == [str(k) for k in range(10)]
    assert train.store.max() == 255 and train.store.min() == 0
    assert held.labels is not None and set(held.labels.tolist()) == set(range(10))


def test_resolution_and_mode_apply_to_builtins() -> None:
    train, held = read_source("digits", resolution=16, mode="RGB")
    assert train.shape == held.shape == (3, 16, 16)
    with pytest.raises(UserError, match="needs file names"):
        read_source("digits", label_from="(.)")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Files of a fake server, {name: bytes}; every other name is offline."""
    files: dict[str, bytes] = {}

    def open_url(url: str, timeout: float) -> io.BytesIO:
        name = url.rsplit("/", 1)[1]
        if name not in files:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(files[name])

    monkeypatch.delenv("SFUMATO_DATA", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", open_url)
    return files


def set_checksums(monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    sums = {file: hashlib.md5(raw).hexdigest() for file, raw in files.items()}
    monkeypatch.setitem(BUILTINS, name, replace(BUILTINS[name], md5=sums))


def test_mnist_is_downloaded_verified_and_cached(
    server: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path, idx: Callable[[np.ndarray], bytes]
) -> None:
    images, labels = np.arange(20 * 4).reshape(20, 2, 2), np.arange(20) % 10
    for part in ("train", "t10k"):
        server[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        server[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels))
    with pytest.raises(UserError, match=r"checksum.*SFUMATO_DATA") as error:
        read_source("mnist")
    assert error.value.code == 1 and not list((cache / "mnist").iterdir())
    set_checksums(monkeypatch, "mnist", server)
    assert len(read_source("mnist")[1]) == 20
    server.clear()
    assert len(read_source("mnist")[0]) == 20  # from the cache, offline


def test_cifar10_binary_is_read(server: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    records = np.random.default_rng(0).integers(0, 256, (4, 3073)).astype(np.uint8)
    records[:, 0] = [3, 1, 4, 9]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", "readme.html"]:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = records.nbytes
            archive.addfile(member, io.BytesIO(records.tobytes()))
    server["cifar-10-binary.tar.gz"] = file.getvalue()
    set_checksums(monkeypatch, "cifar10", server)
    (cache_root() / "cifar10").mkdir(parents=True)  # as a failed download leaves it
    train, held = read_source("cifar10")
    assert len(train) == 20 and len(held) == 4 and train.shape == (3, 32, 32)
    assert held.labels is not None and [held.label_names[k] for k in held.labels] == [
        "cat",
        "automobile",
        "deer",
        "truck",
    ]
    assert (held.pixels[0, 0, :, 0] == records[0, 1:33]).all() and (
        held.pixels[0, 0, :, 2] == records[0, 2049:2081]
    ).all()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_offline_error_names_the_folder(server: dict[str, bytes], name: str) -> None:
    with pytest.raises(UserError, match=rf"cannot be fetched \(no route to host\).*\$SFUMATO_DATA/{name}") as error:
        read_source(name)
    assert error.value.code == 1 and "\n" not in str(error.value)


def test_every_download_has_checksums_and_ten_classes() -> None:
    for name in set(BUILTINS) - {"digits"}:
        files = BUILTINS[name]
        assert len(files.classes) == 10 and all(len(md5) == 32 for md5 in files.md5.values())
        assert files.url.endswith("/")
    assert builtin.FASHION[9] == "Ankle boot"


@pytest.mark.skipif(not (REAL / "mnist").exists(), reason="no $SFUMATO_DATA")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_idx_sets_are_read(name: str) -> None:
    start = time.perf_counter()
    train, held = read_source(name)
    assert time.perf_counter() - start < 10
    assert (len(train), len(held), train.shape) == (60000, 10000, (1, 28, 28))
    assert train.label_names == BUILTINS[name].classes and train.labels is not None
    assert train.labels[:5].tolist() == ([5, 0, 4, 1, 9] if name == "mnist" else [9, 0, 0, 3, 0])


@pytest.mark.skipif(not (REAL / "cifar10_jpeg").exists(), reason="no $SFUMATO_DATA")
def test_real_cifar10_is_read_from_its_tar() -> None:
    data, held = read_source(REAL / "cifar10_jpeg" / "test.tar.xz")
    assert len(data) == 9000 and len(held) == 1000 and data.label_names == builtin.CIFAR
    assert held.labels is not None and np.bincount(held.labels).tolist() == [100] * 10


@pytest.mark.skipif(not (REAL / "flowers_128").exists(), reason="no $SFUMATO_DATA")
def test_real_folders_are_read() -> None:
    flowers, held = read_source(REAL / "flowers_128")
    assert len(flowers) == 1080 and held.shape == (3, 128, 128)
    assert flowers.label_names == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    emoji = read_source(REAL / "noto_emoji_64")[0]
    assert emoji.labels is None and emoji.captions is not None and "joker" in emoji.captions
