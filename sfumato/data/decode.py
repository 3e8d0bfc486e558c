"""Image files to one array of integers: never silently converted, in parallel, bad ones named."""

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from ..errors import UserError
from .base import CHANNELS, Data
from .cache import allocate, key_of, load_pixels, save_pixels
from .files import Files, first_few

CHUNK = 16  # images per task of the pool
WORTH_KEEPING = 2.0  # seconds of decoding from which the result is kept for the next run
_WIDE = frozenset(("I;16", "I;16B", "I;16L", "I;16N", "I"))
_WITH_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
Pixels = NDArray[Any]  # (H, W, C) or (M, H, W, C), uint8 or uint16
Outcome = tuple[Pixels, str] | str  # pixels and mode, or what is wrong


@dataclass
class Decoded:
    """Pixels (M, H, W, C) of the `good` items, and the bad ones with the reason."""

    pixels: Pixels
    mode: str
    good: NDArray[np.int64]
    bad: list[str] = field(default_factory=list)


def native_mode(image: Image.Image, payload: bytes) -> str:
    """The mode that holds all that the file says: "L", "RGB", "RGBA", "I;16", or the name of one not supported."""
    if payload[:8] == b"\x89PNG\r\n\x1a\n" and payload[24] == 16 and payload[25] != 0:
        return f"16-bit {image.mode}"  # Pillow would keep 8 of the 16 bits
    if image.mode in _WIDE:
        return "I;16"
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return "RGBA"
    return {"1": "L", "P": "RGB"}.get(image.mode, image.mode)


def _wide(image: Image.Image) -> Image.Image:
    """A one-channel image as 32-bit floats that hold 0..65535 (Pillow resizes those, and not 16-bit integers)."""
    if image.mode in _WIDE:
        return Image.fromarray(np.asarray(image).astype(np.float32))
    return Image.fromarray(np.asarray(image.convert("L"), np.float32) * 257)


def _convert(image: Image.Image, mode: str, ground: str = "white") -> Image.Image:
    """The image in `mode`; "I;16" comes as floats 0..65535, and transparent pixels end on the ground's colour."""
    if image.mode in _WIDE and mode != "I;16":
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if mode != "RGBA" and (image.mode in _WITH_ALPHA or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    if mode == "I;16":
        return _wide(image)
    return image if image.mode == mode else image.convert(mode)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The middle square, resized to `resolution` by Lanczos."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == resolution:  # whole pixels, untouched
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


class Unsupported(ValueError):
    """The file is an image, but of a kind whose numbers would not survive."""


def _refuse(image: Image.Image) -> None:
    """Raise for numbers that 16 bits cannot hold."""
    if image.mode == "F":
        raise Unsupported("floating-point pixels")
    if image.mode == "I":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if low < 0 or high > 65535:
            raise Unsupported(f"pixels from {low} to {high}")


def decode(
    payload: bytes, resolution: int | None = None, mode: str | None = None, ground: str = "white"
) -> tuple[Pixels, str]:
    """One file's pixels (H, W, C) and mode.

    Args:
        payload: The bytes of the file.
        resolution: Side of the square to crop and resize to; None keeps the size.
        mode: Mode to convert to; None keeps what the file holds.
        ground: Colour that transparent pixels end on, in a mode without transparency.
    """
    with Image.open(BytesIO(payload)) as image:
        found = mode or native_mode(image, payload)
        _refuse(image)
        if found not in CHANNELS:
            return np.empty((image.height, image.width, 0), np.uint8), found
        if resolution and image.format == "JPEG":
            image.draft(None, (2 * resolution, 2 * resolution))  # decodes a large photo at 1/2, 1/4 or 1/8
        image.load()
        if "exif" in image.info or image.format == "TIFF":
            image = ImageOps.exif_transpose(image)
        ready = image if image.mode == found != "I;16" else _convert(image, found, ground)
        return _integers(centre_crop(ready, resolution) if resolution else ready, found), found


def convert(data: Data, resolution: int | None, mode: str | None) -> Data:
    """Data of another size or mode (as `decode` would give it); the same object where nothing changes."""
    mode, side = mode or data.mode, resolution or 0
    if mode == data.mode and (not side or data.shape[1:] == (side, side)):
        return data
    rows = np.arange(len(data)) if data.rows is None else data.rows
    first = reshape(data.store[rows[0]], side, mode)
    store = allocate((len(data), *first.shape), first.dtype)
    for i, row in enumerate(rows):
        store[i] = reshape(data.store[row], side, mode)
    return replace(data, store=store, mode=mode, rows=None)


def reshape(pixels: Pixels, resolution: int, mode: str) -> Pixels:
    """One image's pixels (H, W, C) in another mode, and at another side unless that is 0."""
    image = _convert(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), mode)
    return _integers(centre_crop(image, resolution) if resolution else image, mode)


def _integers(image: Image.Image, mode: str) -> Pixels:
    pixels = np.asarray(image)
    if mode == "I;16":
        pixels = pixels.round().clip(0, 65535).astype(np.uint16)
    return pixels.reshape(*pixels.shape[:2], -1)


def _reason(error: Exception, payload: bytes | None) -> str:
    if payload is None:
        return f"unreadable: {error.strerror}" if isinstance(error, OSError) else str(error)
    if not payload:
        return "empty"
    if isinstance(error, Unsupported):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return "truncated" if "truncated" in str(error).lower() else f"broken: {str(error)[:60] or type(error).__name__}"


Payload = bytes | Exception  # of a file, or why it cannot be read


def _payload(name: str, read: Callable[[str], bytes]) -> Payload:
    try:
        return read(name)
    except Exception as error:  # a damaged file can raise anything
        return error


def _try(name: str, payload: Payload, resolution: int | None, mode: str | None) -> Outcome:
    """Pixels and mode, or what is wrong with the file."""
    if isinstance(payload, Exception):
        return f"{name} ({_reason(payload, None)})"
    try:
        return decode(payload, resolution, mode)
    except Exception as error:  # and so can decoding it
        return f"{name} ({_reason(error, payload)})"


def _outcomes(
    names: Sequence[str], files: Files, resolution: int | None, mode: str | None
) -> Iterator[tuple[int, Outcome]]:
    """(index, outcome) of every file; archives are read by one thread in their own order, and decoded by several."""
    place = files.place

    def task(items: list[tuple[int, Payload | None]]) -> list[tuple[int, Outcome]]:
        read = ((i, _payload(names[i], files.read) if payload is None else payload) for i, payload in items)
        return [(i, _try(names[i], payload, resolution, mode)) for i, payload in read]

    order = sorted(range(len(names)), key=lambda i: place[names[i]] if place else i)
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[list[tuple[int, Outcome]]]] = deque()
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            pending.append(pool.submit(task, [(i, _payload(names[i], files.read) if place else None) for i in chunk]))
            if len(pending) > workers + 1:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def _agree(kinds: Counter[tuple[str, tuple[int, ...]]], root: object) -> None:
    """Raise unless all images are of one supported mode and one size."""
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, ...]] = Counter()
    for (mode, size), count in kinds.items():
        modes[mode] += count
        sizes[size] += count
    if len(modes) > 1 or next(iter(modes)) not in CHANNELS:
        found = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
        word = "different modes" if len(modes) > 1 else "a mode that is not supported as it is"
        raise UserError(f"{root}: images of {word} ({found}); convert them all with --set data.mode=RGB", code=1)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {size[1]}x{size[0]}" for size, count in sizes.most_common(4))
        more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
        remedy = "crop and resize them all with --set data.resolution=64"
        raise UserError(f"{root}: images of different sizes ({found}{more}); {remedy}", code=1)


def _gather(names: Sequence[str], files: Files, resolution: int | None, mode: str | None) -> Decoded:
    kinds: Counter[tuple[str, tuple[int, ...]]] = Counter()
    good: list[int] = []
    bad: list[str] = []
    store: Pixels | None = None
    for i, outcome in _outcomes(names, files, resolution, mode):
        if isinstance(outcome, str):
            bad.append(outcome)
            continue
        pixels, found = outcome
        kinds[found, pixels.shape[:2]] += 1
        good.append(i)
        if store is None:
            store = allocate((len(names), *pixels.shape), pixels.dtype)
        if len(kinds) == 1:
            store[i] = pixels
    if store is None:
        raise UserError(f"{files.root}: no file can be read as an image: {first_few(sorted(bad))}", code=1)
    _agree(kinds, files.root)
    good.sort()
    if bad:
        for target, source in enumerate(good):
            store[target] = store[source]
    return Decoded(store[: len(good)], next(iter(kinds))[0], np.array(good, np.int64), sorted(bad))


def decode_all(
    names: Sequence[str],
    files: Files,
    *,
    resolution: int | None = None,
    mode: str | None = None,
    skip_bad: bool = False,
) -> Decoded:
    """All images of a folder or archive in one array; what took long to decode is kept in the user's cache.

    Args:
        names: Which files, in the order wanted.
        files: Where they lie.
        resolution: Side of the square to crop and resize to; None needs equal sizes.
        mode: Mode to convert to; None needs equal modes.
        skip_bad: Leave files out that cannot be read, instead of raising.
    """
    key = key_of("decoded", 1, files.stamp, list(names), resolution, mode, PIL_VERSION)
    kept = load_pixels(key)
    if kept is not None:
        return Decoded(kept[0], kept[1], np.arange(len(names)))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata and size: what matters is raised
        decoded = _gather(names, files, resolution, mode)
    if decoded.bad and not skip_bad:
        count = f"{len(decoded.bad)} of {len(names)} files cannot be read as images"
        remedy = "mend or remove them, or leave them out with --skip-bad"
        raise UserError(f"{files.root}: {count}: {first_few(decoded.bad)}; {remedy}", code=1)
    if not decoded.bad and time.perf_counter() - start > WORTH_KEEPING:
        save_pixels(key, decoded.pixels, decoded.mode)
    return decoded
