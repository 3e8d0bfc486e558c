"""Decode image files into one integer array, in parallel and without silent conversion; unreadable files are named."""

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from sfumato.data.cache import allocate, key_of, load_decoded, save_decoded
from sfumato.data.files import ARCHIVE, Files, first_few, open_files
from sfumato.errors import UserError
from sfumato.modalities.image.dataset import CHANNELS, ImageDataset

DECODE_CHUNK = 16  # images per task of the thread pool
MAX_DECODE_THREADS = 8
CACHE_AFTER_SECONDS = 2.0  # decoding time from which the result is cached
MODES_16_BIT = frozenset(("I;16", "I;16B", "I;16L", "I;16N", "I"))  # Pillow's modes
MODES_WITH_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
Pixels = NDArray[Any]  # (H, W, C) or (M, H, W, C), uint8 or uint16
Payload = bytes | Exception  # content of a file, or why it cannot be read
Outcome = tuple[Pixels, str] | str  # pixels and mode, or why the file cannot be decoded


@dataclass
class Decoded:
    """Decoded images.

    Args:
        pixels: (M, H, W, C).
        mode: Their mode.
        index: Index of each image's file (M,).
        bad: Names of unreadable files, each with the reason.
    """

    pixels: Pixels
    mode: str
    index: NDArray[np.int64]
    bad: list[str] = field(default_factory=list)


def native_mode(image: Image.Image, payload: bytes) -> str:
    """The lossless mode of a file: "L", "RGB", "RGBA", "I;16", or the name of an unsupported one."""
    if payload[:8] == b"\x89PNG\r\n\x1a\n" and payload[24] == 16 and payload[25] != 0:
        return f"16-bit {image.mode}"  # Pillow decodes only 8 of the 16 bits
    if image.mode in MODES_16_BIT:
        return "I;16"
    if image.mode in MODES_WITH_ALPHA or "transparency" in image.info:
        return "RGBA"
    return {"1": "L", "P": "RGB"}.get(image.mode, image.mode)


def _to_float(image: Image.Image) -> Image.Image:
    """A one-channel image as 32-bit floats 0..65535 (Pillow cannot resize 16-bit integers)."""
    if image.mode in MODES_16_BIT:
        return Image.fromarray(np.asarray(image).astype(np.float32))
    return Image.fromarray(np.asarray(image.convert("L"), np.float32) * 257)


def _convert(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """The image in `mode`; "I;16" as floats 0..65535. Transparent pixels take the background colour."""
    if image.mode in MODES_16_BIT and mode != "I;16":
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if mode != "RGBA" and (image.mode in MODES_WITH_ALPHA or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if mode == "I;16":
        return _to_float(image)
    return image if image.mode == mode else image.convert(mode)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The central square, resized to `resolution` pixels per side (Lanczos)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == resolution:  # no resampling
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


class Unsupported(ValueError):
    """An image whose pixel values no mode can hold."""


def _check_range(image: Image.Image) -> None:
    """Refuse values that 16 bits cannot hold."""
    if image.mode == "F":
        raise Unsupported("floating-point pixels")
    if image.mode == "I":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if low < 0 or high > 65535:
            raise Unsupported(f"pixels from {low} to {high}")


def decode(
    payload: bytes, resolution: int | None = None, mode: str | None = None, background: str = "white"
) -> tuple[Pixels, str]:
    """Pixels (H, W, C) and mode of a file.

    Args:
        payload: Content of the file.
        resolution: Side of the square to crop and resize to, in pixels; None keeps the size.
        mode: Mode to convert to; None keeps the file's.
        background: Colour of transparent pixels in a mode without transparency.
    """
    with Image.open(BytesIO(payload)) as image:
        found = mode or native_mode(image, payload)
        _check_range(image)
        if found not in CHANNELS:
            return np.empty((image.height, image.width, 0), np.uint8), found
        if resolution and image.format == "JPEG":
            image.draft(None, (2 * resolution, 2 * resolution))  # decode large photos at 1/2, 1/4 or 1/8
        image.load()
        if "exif" in image.info or image.format == "TIFF":
            image = ImageOps.exif_transpose(image)
        image = image if image.mode == found != "I;16" else _convert(image, found, background)
        return _to_array(centre_crop(image, resolution) if resolution else image, found), found


def convert(data: ImageDataset, resolution: int | None, mode: str | None) -> ImageDataset:
    """Images at another size or in another mode, as `decode` does it; the same object if nothing changes."""
    mode, side = mode or data.mode, resolution or 0
    if mode == data.mode and (not side or data.shape[1:] == (side, side)):
        return data
    rows = np.arange(len(data)) if data.rows is None else data.rows
    first = convert_pixels(data.store[rows[0]], side, mode)
    store = allocate((len(data), *first.shape), first.dtype)
    for i, row in enumerate(rows):
        store[i] = convert_pixels(data.store[row], side, mode)
    return replace(data, store=store, mode=mode, rows=None)


def convert_pixels(pixels: Pixels, resolution: int, mode: str) -> Pixels:
    """Pixels (H, W, C) in another mode, and cropped and resized to `resolution` unless that is 0."""
    image = _convert(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), mode)
    return _to_array(centre_crop(image, resolution) if resolution else image, mode)


def _to_array(image: Image.Image, mode: str) -> Pixels:
    """Pixels (H, W, C) of an image that `_convert` returned."""
    pixels = np.asarray(image)
    if mode == "I;16":
        pixels = pixels.round().clip(0, 65535).astype(np.uint16)
    return pixels.reshape(*pixels.shape[:2], -1)


def _reason(error: Exception, payload: bytes | None) -> str:
    """Why a file cannot be decoded, or cannot be read if `payload` is None."""
    if payload is None:
        return f"unreadable: {error.strerror}" if isinstance(error, OSError) else str(error)
    if not payload:
        return "empty"
    if isinstance(error, Unsupported):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return "truncated" if "truncated" in str(error).lower() else f"broken: {str(error)[:60] or type(error).__name__}"


def image_files(path: Path) -> Files:
    """The files of a folder or an archive, or the one file."""
    if path.is_dir() or ARCHIVE.search(path.name):
        return open_files(path)
    return Files(path, [path.name], lambda name: path.with_name(name).read_bytes(), str(path))


def _read(name: str, read: Callable[[str], bytes]) -> Payload:
    try:
        return read(name)
    except Exception as error:  # reading a damaged file can raise anything
        return error


def _decode(name: str, payload: Payload, resolution: int | None, mode: str | None) -> Outcome:
    """Pixels and mode of a file, or why there are none."""
    if isinstance(payload, Exception):
        return f"{name} ({_reason(payload, None)})"
    try:
        return decode(payload, resolution, mode)
    except Exception as error:  # so can decoding it
        return f"{name} ({_reason(error, payload)})"


def _decode_files(
    names: Sequence[str], files: Files, resolution: int | None, mode: str | None
) -> Iterator[tuple[int, Outcome]]:
    """(index, outcome) of every file. Archives are read in their order by one thread and decoded by several."""
    offsets = files.offsets

    def task(items: list[tuple[int, Payload | None]]) -> list[tuple[int, Outcome]]:
        payloads = ((i, _read(names[i], files.read) if payload is None else payload) for i, payload in items)
        return [(i, _decode(names[i], payload, resolution, mode)) for i, payload in payloads]

    order = sorted(range(len(names)), key=lambda i: offsets[names[i]] if offsets else i)
    workers = min(MAX_DECODE_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[list[tuple[int, Outcome]]]] = deque()
        for start in range(0, len(order), DECODE_CHUNK):
            chunk = order[start : start + DECODE_CHUNK]
            items = [(i, _read(names[i], files.read) if offsets else None) for i in chunk]
            pending.append(pool.submit(task, items))
            if len(pending) > workers + 1:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def _check_uniform(counts: Counter[tuple[str, tuple[int, ...]]], root: object) -> None:
    """Refuse images of several modes or sizes, or of an unsupported mode.

    Args:
        counts: Number of images of each (mode, (height, width)).
        root: Where they are from.
    """
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, ...]] = Counter()
    for (mode, size), count in counts.items():
        modes[mode] += count
        sizes[size] += count
    if len(modes) > 1 or next(iter(modes)) not in CHANNELS:
        found = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
        problem = "different modes" if len(modes) > 1 else "a mode that is not supported as it is"
        raise UserError(f"{root}: images of {problem} ({found}); convert them all with --set data.mode=RGB", code=1)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {size[1]}x{size[0]}" for size, count in sizes.most_common(4))
        more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
        remedy = "crop and resize them all with --set data.resolution=64"
        raise UserError(f"{root}: images of different sizes ({found}{more}); {remedy}", code=1)


def _collect(names: Sequence[str], files: Files, resolution: int | None, mode: str | None) -> Decoded:
    """All files that can be decoded, in the order of `names`."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    good: list[int] = []
    bad: list[str] = []
    store: Pixels | None = None
    for i, outcome in _decode_files(names, files, resolution, mode):
        if isinstance(outcome, str):
            bad.append(outcome)
            continue
        pixels, found = outcome
        counts[found, pixels.shape[:2]] += 1
        good.append(i)
        if store is None:
            store = allocate((len(names), *pixels.shape), pixels.dtype)
        if len(counts) == 1:
            store[i] = pixels
    if store is None:
        raise UserError(f"{files.root}: no file can be read as an image: {first_few(sorted(bad))}", code=1)
    _check_uniform(counts, files.root)
    good.sort()
    if bad:  # close the gaps
        for target, source in enumerate(good):
            store[target] = store[source]
    return Decoded(store[: len(good)], next(iter(counts))[0], np.array(good, np.int64), sorted(bad))


def decode_all(
    names: Sequence[str],
    files: Files,
    *,
    resolution: int | None = None,
    mode: str | None = None,
    skip_bad: bool = False,
) -> Decoded:
    """All images of a folder or archive in one array; the result of a slow decoding is cached.

    Args:
        names: Names of the files, in the order of the result.
        files: The folder or archive.
        resolution: Side of the square to crop and resize to, in pixels; None requires equal sizes.
        mode: Mode to convert to; None requires equal modes.
        skip_bad: Leave out files that cannot be decoded, instead of raising.
    """
    key = key_of("decoded", 1, files.stamp, list(names), resolution, mode, PIL_VERSION)
    cached = load_decoded(key)
    if cached is not None:
        return Decoded(cached[0], cached[1], np.arange(len(names)))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow about metadata and size; errors are raised
        decoded = _collect(names, files, resolution, mode)
    if decoded.bad and not skip_bad:
        count = f"{len(decoded.bad)} of {len(names)} files cannot be read as images"
        remedy = "repair or remove them, or leave them out with --skip-bad"
        raise UserError(f"{files.root}: {count}: {first_few(decoded.bad)}; {remedy}", code=1)
    if not decoded.bad and time.perf_counter() - start > CACHE_AFTER_SECONDS:
        save_decoded(key, decoded.pixels, decoded.mode)
    return decoded
