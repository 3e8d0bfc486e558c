"""Images that come as arrays: .npz, and the idx files of MNIST."""

import gzip
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .base import Data, Parts
from .files import first_few
from .labels import encode_labels, renumbered

IDX = re.compile(r"(-|\.)idx\d(-ubyte)?(\.gz)?$|-ubyte(\.gz)?$", re.IGNORECASE)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_TRAIN = ("images", "x_train", "train_images", "x", "data", "arr_0")
_TRAIN_LABELS = ("labels", "label", "y_train", "train_labels", "y", "targets", "arr_1")
_HELD = ("x_test", "test_images", "x_val", "val_images")
_HELD_LABELS = ("y_test", "test_labels", "y_val", "val_labels")


def _integers(pixels: NDArray[Any], where: str, notes: list[str]) -> NDArray[Any]:
    """Pixels as uint8 or uint16, changed only in type; floats in [0, 1] are rounded to 8 bits, and said so."""
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if pixels.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return pixels.astype(np.uint8 if high <= 255 else np.uint16)
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        notes.append(f"{where}: {pixels.dtype} values in [0, 1] are kept in 8 bits")
        return (pixels * 255).round().astype(np.uint8)
    found = f"{pixels.dtype} from {low:g} to {high:g}"
    raise UserError(f"{where}: pixels are {found}; save them as uint8 (0..255), uint16, or floats in [0, 1]", code=1)


def array_data(pixels: NDArray[Any], labels: NDArray[Any] | None, where: str) -> Data:
    """Data of an array (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1, 3 or 4, and labels (N,) or (N, 1)."""
    notes: list[str] = []
    shape = pixels.shape
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif pixels.ndim == 4 and shape[-1] not in (1, 3, 4) and shape[1] in (1, 3, 4):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise UserError(f"{where}: shape {shape} is not images; want (N, H, W) or (N, H, W, 1|3|4)", code=1)
    pixels = np.ascontiguousarray(_integers(pixels, where, notes))
    if pixels.dtype == np.uint16 and pixels.shape[-1] != 1:
        raise UserError(f"{where}: 16-bit images must have one channel, these have {pixels.shape[-1]}", code=1)
    mode = "I;16" if pixels.dtype == np.uint16 else {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    if labels is None:
        return Data(pixels, mode, notes=notes)
    if labels.size != len(pixels):
        raise UserError(f"{where}: {len(pixels)} images but labels of shape {labels.shape}", code=1)
    return Data(pixels, mode, None, *encode_labels(labels.reshape(-1).tolist()), notes=notes)


def same_classes(train: Data, held: Data | None, where: object) -> Parts:
    """Renumber both parts over the classes of the training part; a class it lacks raises."""
    if held is None or held.labels is None or train.labels is None:
        return train, held
    number = {name: k for k, name in enumerate(train.label_names)}
    unknown = [name for name in held.label_names if name not in number]
    if unknown:
        raise UserError(f"{where}: held-out classes the training part lacks: {first_few(unknown)}", code=1)
    held.labels = renumbered(held.labels, [number[name] for name in held.label_names])
    held.label_names = train.label_names
    return train, held


def read_npz(path: Path) -> Parts:
    """Training part and, where the file has x_test or the like, the held-out part."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key.lower(): file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})", code=1) from error
    train = _pick(arrays, _TRAIN)
    if train is None:
        found = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
        raise UserError(f"{path}: no images under {', '.join(_TRAIN)}; found {found}", code=1)
    held = _pick(arrays, _HELD)
    data = array_data(train, _pick(arrays, _TRAIN_LABELS), str(path))
    rest = None if held is None else array_data(held, _pick(arrays, _HELD_LABELS), str(path))
    return same_classes(data, rest, path)


def _pick(arrays: Mapping[str, NDArray[Any]], keys: tuple[str, ...]) -> NDArray[Any] | None:
    return next((arrays[key] for key in keys if key in arrays), None)


def read_idx(path: Path) -> NDArray[Any]:
    """The array of one idx file, packed by gzip or not."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})", code=1) from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or len(raw) < 4 + 4 * raw[3]:
        raise UserError(f"{path}: not an idx file", code=1)
    shape = tuple(np.frombuffer(raw, ">i4", raw[3], 4).tolist())
    kind = np.dtype(_IDX_TYPES[raw[2]])
    body = memoryview(raw)[4 + 4 * raw[3] :]
    if len(body) != np.prod(shape, dtype=np.int64) * kind.itemsize:
        raise UserError(f"{path}: truncated: shape {shape} does not fit its {len(raw)} bytes", code=1)
    return np.frombuffer(body, kind).astype(kind.newbyteorder("=")).reshape(shape)


def _labels_beside(images: Path) -> NDArray[Any] | None:
    base = re.sub(r"\.gz$", "", images.name.replace("images", "labels").replace("idx3", "idx1"))
    if base == re.sub(r"\.gz$", "", images.name):
        return None
    beside = next((p for p in (images.with_name(base + ".gz"), images.with_name(base)) if p.exists()), None)
    return None if beside is None else read_idx(beside)


def idx_data(path: Path) -> Data:
    """Images of an idx file, with the labels of the file beside it whose name says labels instead of images."""
    return array_data(read_idx(path), _labels_beside(path), str(path))


def read_idx_folder(folder: Path, found: list[str]) -> Parts:
    """The images file, and the held-out one (t10k or test) where there is one."""
    images = sorted(name for name in found if "images" in name or "idx3" in name)
    held = [name for name in images if re.search("t10k|test|val", name)]
    train = [name for name in images if name not in held]
    if len(train) != 1:
        raise UserError(f"{folder}: want one idx file of training images, found {first_few(train) or 'none'}", code=1)
    data = idx_data(folder / train[0])
    return same_classes(data, idx_data(folder / held[0]) if held else None, folder)
