"""Images that come as arrays: .npy, .npz, and the idx files of MNIST; what is too large for memory is mapped."""

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .base import Data, Parts
from .cache import allocate, load_array
from .files import first_few
from .labels import encode_labels, renumbered

IDX = re.compile(r"(-|\.)idx\d(-ubyte)?(\.gz)?$|-ubyte(\.gz)?$", re.IGNORECASE)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PIECE = 2**24  # bytes converted or read at a time
_TRAIN = ("images", "x_train", "train_images", "x", "data", "arr_0")
_TRAIN_LABELS = ("labels", "label", "y_train", "train_labels", "y", "targets", "arr_1")
_HELD = ("x_test", "test_images", "x_val", "val_images")
_HELD_LABELS = ("y_test", "test_labels", "y_val", "val_labels")


def _pieces(array: NDArray[Any]) -> Iterator[slice]:
    """Slices of the first axis, of so many items that one is small beside memory."""
    step = max(1, PIECE * len(array) // max(1, array.nbytes))
    return (slice(start, start + step) for start in range(0, len(array), step))


def _integers(pixels: NDArray[Any], where: str, notes: list[str]) -> NDArray[Any]:
    """Pixels as uint8 or uint16, in the order of their axes, changed only in type; see `_rule`."""
    kind, convert = _rule(pixels, where, notes)
    if kind == pixels.dtype and pixels.flags.c_contiguous:
        return pixels
    store = allocate(pixels.shape, kind)
    for piece in _pieces(pixels):
        store[piece] = convert(pixels[piece])
    return store


def _rule(pixels: NDArray[Any], where: str, notes: list[str]) -> tuple[type[np.integer], Callable[[Any], Any]]:
    """uint8 or uint16, and what makes it of pixels; floats in [0, 1] are rounded to 8 bits, and said so."""
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.dtype.type, lambda part: part
    if pixels.dtype == np.bool_:
        return np.uint8, lambda part: part * np.uint8(255)
    found = str(pixels.dtype)
    if pixels.dtype.kind in "iuf":
        ends = [(float(pixels[piece].min()), float(pixels[piece].max())) for piece in _pieces(pixels)]
        low, high = np.min(ends), np.max(ends)  # not a number where one of them is
        if pixels.dtype.kind != "f" and low >= 0 and high <= 65535:
            return (np.uint8 if high <= 255 else np.uint16), lambda part: part
        if low >= 0 and high <= 1:
            notes.append(f"{where}: {pixels.dtype} values in [0, 1] are kept in 8 bits")
            return np.uint8, lambda part: (part * 255).round()
        found += f" from {low:g} to {high:g}"
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
    pixels = _integers(pixels, where, notes)
    if pixels.dtype == np.uint16 and pixels.shape[-1] != 1:
        raise UserError(f"{where}: 16-bit images must have one channel, these have {pixels.shape[-1]}", code=1)
    mode = "I;16" if pixels.dtype == np.uint16 else {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    if labels is None:
        return Data(pixels, mode, notes=notes)
    if labels.size != len(pixels):
        raise UserError(f"{where}: {len(pixels)} images but labels of shape {labels.shape}", code=1)
    different, number = np.unique(labels, return_inverse=True)
    numbers, names = encode_labels(different.tolist())
    return Data(pixels, mode, None, numbers[number.reshape(-1)], names, notes=notes)


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


def filled(file: IO[bytes] | gzip.GzipFile, shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
    """An array whose bytes are the next ones of a file, in memory or mapped as by `allocate`.

    Raises:
        EOFError: There are fewer.
    """
    array = allocate(shape, kind)
    raw = array.reshape(-1).view(np.uint8)
    for start in range(0, len(raw), PIECE):
        part = file.read(min(PIECE, len(raw) - start))
        if len(part) < min(PIECE, len(raw) - start):
            raise EOFError(f"it ends after {start + len(part)} of {len(raw)} bytes")
        raw[start : start + len(part)] = np.frombuffer(part, np.uint8)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis varies fastest, and type of what follows in an .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, reverse, kind = read(file)
    if kind.hasobject:
        raise ValueError("it holds Python objects")
    return shape, reverse, kind


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an .npz, read piece by piece."""
    with archive.open(name) as file:
        shape, reverse, kind = _header(file)
        array = filled(file, shape[::-1] if reverse else shape, kind)
        return array.T if reverse else array


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as file:
        return _header(file)[0]


def read_npz(path: Path) -> Parts:
    """Training part and, where the file has x_test or the like, the held-out part."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {n.removesuffix(".npy").lower(): n for n in archive.namelist() if n.endswith(".npy")}
            keys = [_pick(members, wanted) for wanted in (_TRAIN, _TRAIN_LABELS, _HELD, _HELD_LABELS)]
            shapes = {key: _shape(archive, name) for key, name in members.items()}
            train, labels, held, held_labels = (None if k is None else _member(archive, members[k]) for k in keys)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})", code=1) from error
    if train is None:
        found = ", ".join(f"{key} {shape}" for key, shape in shapes.items()) or "nothing"
        raise UserError(f"{path}: no images under {', '.join(_TRAIN)}; found {found}", code=1)
    data = array_data(train, labels, str(path))
    rest = None if held is None else array_data(held, held_labels, str(path))
    return same_classes(data, rest, path)


def _pick(members: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in members), None)


def read_npy(path: Path) -> Data:
    """Images of an .npy file, with the labels of the file beside it whose name says labels instead of images."""
    return array_data(_plain(path), _labels_beside(path, _plain), str(path))


def _plain(path: Path) -> NDArray[Any]:
    try:
        return load_array(path)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not an .npy of a plain array ({error})", code=1) from error


def read_idx(path: Path) -> NDArray[Any]:
    """The array of one idx file, packed by gzip or not."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            return _idx_array(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read or is truncated ({error})", code=1) from error


def _idx_array(file: IO[bytes] | gzip.GzipFile, path: Path) -> NDArray[Any]:
    head = file.read(4)
    sizes = file.read(4 * head[3]) if len(head) == 4 else b""
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or len(sizes) < 4 * head[3]:
        raise UserError(f"{path}: not an idx file", code=1)
    shape = tuple(np.frombuffer(sizes, ">i4").tolist())
    array = filled(file, shape, np.dtype(_IDX_TYPES[head[2]]))
    if file.read(1):
        raise UserError(f"{path}: damaged: there is more in it than shape {shape} needs", code=1)
    return array


def _labels_beside(images: Path, read: Callable[[Path], NDArray[Any]]) -> NDArray[Any] | None:
    base = re.sub(r"\.gz$", "", images.name.replace("images", "labels").replace("idx3", "idx1"))
    if base == re.sub(r"\.gz$", "", images.name):
        return None
    beside = next((p for p in (images.with_name(base + ".gz"), images.with_name(base)) if p.exists()), None)
    return None if beside is None else read(beside)


def idx_data(path: Path) -> Data:
    """Images of an idx file, with the labels of the file beside it whose name says labels instead of images."""
    return array_data(read_idx(path), _labels_beside(path, read_idx), str(path))


def read_idx_folder(folder: Path, found: list[str]) -> Parts:
    """The images file, and the held-out one (t10k or test) where there is one."""
    images = sorted(name for name in found if "images" in name or "idx3" in name)
    held = [name for name in images if re.search("t10k|test|val", name)]
    train = [name for name in images if name not in held]
    if len(train) != 1:
        raise UserError(f"{folder}: want one idx file of training images, found {first_few(train) or 'none'}", code=1)
    data = idx_data(folder / train[0])
    return same_classes(data, idx_data(folder / held[0]) if held else None, folder)
