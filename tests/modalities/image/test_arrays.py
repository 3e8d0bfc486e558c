"""Images from arrays: the same whether in memory or mapped from disk."""

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sfumato.data import cache
from sfumato.errors import UserError
from sfumato.modalities.image import arrays
from sfumato.modalities.image.read import read_images

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (9, 3, 6, 5)).astype(np.uint8)
ARRAYS = {
    "bytes": BYTES.transpose(0, 2, 3, 1).copy(),
    "channels first": BYTES,
    "fortran order": np.asfortranarray(BYTES[:, 0]),
    "16 bits": RNG.integers(0, 65536, (9, 6, 5)).astype(np.uint16),
    "big-endian": RNG.integers(300, 65536, (9, 6, 5)).astype(">u2"),
    "integers": RNG.integers(0, 256, (9, 6, 5)),
    "floats": RNG.random((9, 6, 5)),
    "booleans": RNG.random((9, 6, 5)) > 0.5,
}


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Limits arrays in memory to ten bytes, and chunks to a hundred."""

    def shrink() -> None:
        monkeypatch.setattr(cache, "IN_MEMORY", 10)
        monkeypatch.setattr(arrays, "CHUNK_BYTES", 100)

    return shrink


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "npy"])
@pytest.mark.parametrize("name", ARRAYS)
def test_mapped_arrays_are_read_equally(tmp_path: Path, small_memory: Callable[[], None], kind: str, name: str) -> None:
    path = tmp_path / f"images.{kind.split()[-1]}"
    if kind == "npy":
        np.save(path, ARRAYS[name])
        np.save(tmp_path / "labels.npy", np.arange(9) % 2)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, images=ARRAYS[name], labels=np.arange(9) % 2)
    in_memory = read_images(path)[0]
    small_memory()
    mapped = read_images(path)[0]
    assert isinstance(mapped.store, np.memmap) and not isinstance(in_memory.store, np.memmap)
    assert (
        mapped.mode == in_memory.mode and (mapped.pixels == in_memory.pixels).all() and mapped.notes == in_memory.notes
    )
    assert mapped.fingerprint == in_memory.fingerprint and mapped.label_names == ["0", "1"]
    assert (mapped.batch([8, 1]).data == in_memory.batch([8, 1]).data).all()


def test_pixel_values_are_kept() -> None:
    read = lambda name: arrays.from_array(ARRAYS[name], {}, "here")
    assert (read("big-endian").store[..., 0] == ARRAYS["big-endian"]).all()
    assert (read("integers").store[..., 0] == ARRAYS["integers"]).all() and read("integers").mode == "L"
    assert (read("booleans").store[..., 0] == ARRAYS["booleans"] * 255).all()
    assert np.abs(read("floats").store[..., 0] - ARRAYS["floats"] * 255).max() <= 0.5
    assert (read("channels first").store == BYTES.transpose(0, 2, 3, 1)).all()


def test_idx_files_are_mapped(
    tmp_path: Path, small_memory: Callable[[], None], idx: Callable[[np.ndarray], bytes]
) -> None:
    raw = idx(ARRAYS["integers"])
    small_memory()
    for name, content in (("a-images-idx3-ubyte", raw), ("b-images-idx3-ubyte.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        assert (read_images(tmp_path / name)[0].pixels[..., 0] == ARRAYS["integers"]).all()
    (tmp_path / "a-images-idx3-ubyte").write_bytes(raw + b"x")
    with pytest.raises(UserError, match=r"more bytes than shape \(9, 6, 5\)"):
        read_images(tmp_path / "a-images-idx3-ubyte")


def test_unused_arrays_are_not_read(tmp_path: Path) -> None:
    """A damaged array is an error only if it is used."""
    path, whole = tmp_path / "a.npz", tmp_path / "whole.npz"
    np.savez(whole, images=ARRAYS["integers"], other=ARRAYS["floats"])
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            raw = source.read(name)
            target.writestr(name, raw[:-8] if name == "other.npy" else raw)
    assert len(read_images(path)[0]) == 9
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("images.npy", raw[:-8])
    with pytest.raises(UserError, match=r"not an \.npz of plain arrays \(it ends after 2152 of 2160 bytes\)"):
        read_images(path)


def test_invalid_npy_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"hello")
    np.save(tmp_path / "b.npy", np.array([{}], object))
    np.save(tmp_path / "c.npy", np.array(["a", "b"] * 8).reshape(4, 2, 2))
    for name, message in (("a", "not an .npy"), ("b", "not an .npy"), ("c", "pixels are <U1; save them")):
        with pytest.raises(UserError, match=message):
            read_images(tmp_path / f"{name}.npy")


def test_nan_pixels_are_refused(tmp_path: Path) -> None:
    unit = ARRAYS["floats"].copy()
    unit[4, 0, 0] = np.nan
    with pytest.raises(UserError, match="float64 from nan to nan"):
        arrays.from_array(unit, {}, "here")
