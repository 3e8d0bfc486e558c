"""Read images from arrays: .npy, .npz and the idx files of MNIST; large arrays are mapped to disk."""

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.cache import allocate, load_array
from sfumato.data.conditions import LABEL, Known, Labels
from sfumato.data.files import first_few
from sfumato.data.metadata import ConditionOptions, check_column, renumber_labels
from sfumato.errors import UserError
from sfumato.modalities.image.dataset import ImageDataset, Parts

IDX = re.compile(r"(-|\.)idx\d(-ubyte)?(\.gz)?$|-ubyte(\.gz)?$", re.IGNORECASE)
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CHUNK_BYTES = 2**24  # bytes converted or read at a time
TRAIN_KEYS = ("images", "x_train", "train_images", "x", "data", "arr_0")  # names of arrays in an .npz, best first
TRAIN_LABEL_KEYS = ("labels", "label", "y_train", "train_labels", "y", "targets", "arr_1")
HELD_OUT_KEYS = ("x_test", "test_images", "x_val", "val_images")
HELD_OUT_LABEL_KEYS = ("y_test", "test_labels", "y_val", "val_labels")
HELD_OUT_PATTERNS = ("{}_test", "test_{}", "{}_val", "val_{}")  # names of the held-out array of another condition
Arrays = tuple[NDArray[Any], Mapping[str, NDArray[Any]]]  # pixels, and conditions by name


def _chunks(array: NDArray[Any]) -> Iterator[slice]:
    """Slices of the first axis, of about `CHUNK_BYTES` each."""
    step = max(1, CHUNK_BYTES * len(array) // max(1, array.nbytes))
    return (slice(start, start + step) for start in range(0, len(array), step))


def _to_integers(pixels: NDArray[Any], source: str, notes: list[str]) -> NDArray[Any]:
    """Pixels as uint8 or uint16; see `_conversion`."""
    dtype, convert = _conversion(pixels, source, notes)
    if dtype == pixels.dtype and pixels.flags.c_contiguous:
        return pixels
    store = allocate(pixels.shape, dtype)
    for chunk in _chunks(pixels):
        store[chunk] = convert(pixels[chunk])
    return store


def _conversion(
    pixels: NDArray[Any], source: str, notes: list[str]
) -> tuple[type[np.integer], Callable[[NDArray[Any]], Any]]:
    """uint8 or uint16, and the conversion to it; floats in [0, 1] are rounded to 8 bits, with a note."""
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.dtype.type, lambda part: part
    if pixels.dtype == np.bool_:
        return np.uint8, lambda part: part * np.uint8(255)
    found = str(pixels.dtype)
    if pixels.dtype.kind in "iuf":
        ranges = [(float(pixels[chunk].min()), float(pixels[chunk].max())) for chunk in _chunks(pixels)]
        low, high = np.min(ranges), np.max(ranges)  # NaN if any value is
        if pixels.dtype.kind != "f" and low >= 0 and high <= 65535:
            return (np.uint8 if high <= 255 else np.uint16), lambda part: part
        if low >= 0 and high <= 1:
            notes.append(f"{source}: {pixels.dtype} values in [0, 1] are kept in 8 bits")
            return np.uint8, lambda part: (part * 255).round()
        found += f" from {low:g} to {high:g}"
    raise UserError(f"{source}: pixels are {found}; save them as uint8 (0..255), uint16, or floats in [0, 1]", code=1)


def from_array(
    pixels: NDArray[Any], columns: Mapping[str, NDArray[Any]], source: str, options: ConditionOptions | None = None
) -> ImageDataset:
    """A data set of pixels and conditions.

    Args:
        pixels: (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1, 3 or 4.
        columns: The conditions by name, each (N,) or (N, 1).
        source: Where they are from, for errors and notes.
        options: Which conditions are numbers; default none.
    """
    notes: list[str] = []
    shape = pixels.shape
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif pixels.ndim == 4 and shape[-1] not in (1, 3, 4) and shape[1] in (1, 3, 4):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise UserError(f"{source}: shape {shape} is not images; want (N, H, W) or (N, H, W, 1|3|4)", code=1)
    pixels = _to_integers(pixels, source, notes)
    if pixels.dtype == np.uint16 and pixels.shape[-1] != 1:
        raise UserError(f"{source}: 16-bit images must have one channel, these have {pixels.shape[-1]}", code=1)
    mode = "I;16" if pixels.dtype == np.uint16 else {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    conditions: dict[str, Known] = {}
    for name, values in columns.items():
        if values.size != len(pixels):
            raise UserError(f"{source}: {len(pixels)} images but {name} of shape {values.shape}", code=1)
        conditions[name] = _condition(name, values.reshape(-1), source, options or ConditionOptions())
    return ImageDataset(pixels, mode, conditions=conditions, notes=notes)


def _condition(name: str, values: NDArray[Any], source: str, options: ConditionOptions) -> Known:
    """The condition that an array (N,) holds."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    known = options.condition(name, distinct.tolist(), [f"item {i}" for i in first], source)
    return known.select(inverse.reshape(-1))


def check_classes(condition: str, held: Sequence[str], trained: Sequence[str], source: object) -> None:
    """Refuse held-out classes that are not among those of the training part."""
    unknown = [name for name in held if name not in trained]
    if unknown:
        lacking = f"held-out classes the training part lacks: {first_few(unknown)}"
        raise UserError(f"{source}: {condition}: {lacking}", code=1)


def align_classes(train: ImageDataset, held: ImageDataset | None, source: object) -> Parts:
    """Give the held-out classes of each label the numbers of the training part.

    Raises:
        UserError: The training part lacks a class.
    """
    for condition, trained in train.conditions.items():
        known = held.conditions.get(condition) if held is not None else None
        if held is not None and isinstance(trained, Labels) and isinstance(known, Labels):
            check_classes(condition, known.names, trained.names, source)
            number = {name: k for k, name in enumerate(trained.names)}
            numbers = renumber_labels(known.numbers, [number[name] for name in known.names])
            held.conditions[condition] = Labels(numbers, trained.names)
    return train, held


def read_into_array(file: IO[bytes] | gzip.GzipFile, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of the next bytes of a file, in memory or mapped as by `allocate`.

    Raises:
        EOFError: The file is too short.
    """
    array = allocate(shape, dtype)
    raw = array.reshape(-1).view(np.uint8)
    for start in range(0, len(raw), CHUNK_BYTES):
        part = file.read(min(CHUNK_BYTES, len(raw) - start))
        if len(part) < min(CHUNK_BYTES, len(raw) - start):
            raise EOFError(f"it ends after {start + len(part)} of {len(raw)} bytes")
        raw[start : start + len(part)] = np.frombuffer(part, np.uint8)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype, from the header of an .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an .npz."""
    with archive.open(name) as file:
        shape, fortran, dtype = _header(file)
        array = read_into_array(file, shape[::-1] if fortran else shape, dtype)
        return array.T if fortran else array


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Shape of one array of an .npz."""
    with archive.open(name) as file:
        return _header(file)[0]


def _columns(
    members: Mapping[str, str], names: Sequence[str], label_keys: Sequence[str], patterns: Sequence[str]
) -> dict[str, str]:
    """The array of each condition that is in an .npz: of `label` one of `label_keys`, else one with its name."""
    named = {name: [pattern.format(name.lower()) for pattern in patterns] for name in names if name != LABEL}
    taken = {key for keys in named.values() for key in keys}
    free = [key for key in label_keys if key not in taken]
    choices = {name: named.get(name, free) for name in (names if LABEL in names else (LABEL, *names))}
    found = {name: next((key for key in keys if key in members), None) for name, keys in choices.items()}
    return {name: key for name, key in found.items() if key}


def _read_parts(archive: zipfile.ZipFile, names: Sequence[str], path: Path) -> tuple[Arrays, Arrays | None]:
    """Pixels and conditions of the training part, and of the held-out one if there is one."""
    members = {n.removesuffix(".npy").lower(): n for n in archive.namelist() if n.endswith(".npy")}
    shapes = {key: _shape(archive, name) for key, name in members.items()}
    train, held = (next((key for key in keys if key in members), None) for keys in (TRAIN_KEYS, HELD_OUT_KEYS))
    if train is None:
        found = ", ".join(f"{key} {shape}" for key, shape in shapes.items()) or "nothing"
        raise UserError(f"{path}: no images under {', '.join(TRAIN_KEYS)}; found {found}", code=1)
    columns = _columns(members, names, TRAIN_LABEL_KEYS, ("{}",))
    for name in names:
        check_column(name, [*columns, *(key for key, shape in shapes.items() if len(shape) == 1)], path)
    held_columns = _columns(members, names, HELD_OUT_LABEL_KEYS, HELD_OUT_PATTERNS)

    def read(pixels: str, columns: Mapping[str, str]) -> Arrays:
        conditions = {name: _member(archive, members[key]) for name, key in columns.items()}
        return _member(archive, members[pixels]), conditions

    return read(train, columns), None if held is None else read(held, held_columns)


def read_npz(path: Path, options: ConditionOptions) -> Parts:
    """Training part, and the held-out one if the file has `x_test` or the like.

    The array `labels` (or `y_train` or the like) is the condition `label`; others are conditions if the options name
    them, and their held-out values are under `HELD_OUT_PATTERNS`.

    Args:
        path: The file.
        options: Further conditions, and which conditions are numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            train, held = _read_parts(archive, options.label_column, path)
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})", code=1) from error
    data = from_array(*train, str(path), options)
    if held is None:
        return data, None
    absent = [name for name in options.label_column if name not in held[1]]
    if absent:
        data.notes.append(f"{path}: the held-out images have no {', '.join(absent)} (no array {absent[0]}_test)")
    return align_classes(data, from_array(*held, str(path), options.like(data.conditions)), path)


def read_npy(path: Path) -> ImageDataset:
    """Images of an .npy file, with labels from `_labels_beside`."""
    return from_array(_load_npy(path), _labels_beside(path, _load_npy), str(path))


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        return load_array(path)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not an .npy of a plain array ({error})", code=1) from error


def read_idx(path: Path) -> NDArray[Any]:
    """The array of an idx file, compressed by gzip or not."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as file:
            return _idx_array(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read or is truncated ({error})", code=1) from error


def _idx_array(file: IO[bytes] | gzip.GzipFile, path: Path) -> NDArray[Any]:
    head = file.read(4)  # two zero bytes, the dtype, the number of axes
    sizes = file.read(4 * head[3]) if len(head) == 4 else b""
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_DTYPES or len(sizes) < 4 * head[3]:
        raise UserError(f"{path}: not an idx file", code=1)
    shape = tuple(np.frombuffer(sizes, ">i4").tolist())
    array = read_into_array(file, shape, np.dtype(IDX_DTYPES[head[2]]))
    if file.read(1):
        raise UserError(f"{path}: damaged: it has more bytes than shape {shape} needs", code=1)
    return array


def _labels_beside(images: Path, read: Callable[[Path], NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The label from the file beside `images` that has "labels" in its name instead of "images", if there is one."""
    base = re.sub(r"\.gz$", "", images.name.replace("images", "labels").replace("idx3", "idx1"))
    if base == re.sub(r"\.gz$", "", images.name):
        return {}
    labels = next((p for p in (images.with_name(base + ".gz"), images.with_name(base)) if p.exists()), None)
    return {} if labels is None else {LABEL: read(labels)}


def read_idx_images(path: Path) -> ImageDataset:
    """Images of an idx file, with labels from `_labels_beside`."""
    return from_array(read_idx(path), _labels_beside(path, read_idx), str(path))


def read_idx_folder(folder: Path, names: list[str]) -> Parts:
    """Training part, and the held-out one (t10k or test) if there is one, from the idx files `names` of a folder."""
    images = sorted(name for name in names if "images" in name or "idx3" in name)
    held = [name for name in images if re.search("t10k|test|val", name)]
    train = [name for name in images if name not in held]
    if len(train) != 1:
        raise UserError(f"{folder}: want one idx file of training images, found {first_few(train) or 'none'}", code=1)
    data = read_idx_images(folder / train[0])
    return align_classes(data, read_idx_images(folder / held[0]) if held else None, folder)
