"""Images to a folder of PNG files with their metadata, all or nothing; and a sheet of them to look at."""

import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..types import at_once
from .cache import allocate, atomic
from .labels import METADATA

_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}  # PNG's number for grey, RGB, RGBA
_WIDEST = 1024  # pixels a sample sheet is enlarged to at most
PICTURES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}  # formats of a picture to look at, by the suffix of its name


def to_pixels(items: Tensor, mode: str | None = None) -> NDArray[Any]:
    """Integers (N, H, W, C) of images (N, C, H, W) in [-1, 1]: uint8, or uint16 for mode "I;16"."""
    wide = mode == "I;16"
    if not all(bool(torch.isfinite(part).all()) for part in items.split(at_once(items.shape[1:], len(items)))):
        raise UserError("the images hold values that are not numbers (NaN or infinite): nothing written", code=1)
    half = 32767.5 if wide else 127.5
    count, channels, height, width = items.shape
    pixels, first = allocate((count, height, width, channels), np.uint16 if wide else np.uint8), 0
    for part in items.detach().split(at_once(items.shape[1:], count)):  # what is generated may be larger than memory
        scaled = part.to("cpu", torch.float32).add(1).mul_(half).round_().clamp_(0, 2 * half)
        pixels[first : first + len(part)] = scaled.permute(0, 2, 3, 1).numpy()
        first += len(part)
    return pixels


def png(pixels: NDArray[Any]) -> bytes:
    """A PNG file of pixels (H, W, C), uint8 or uint16: quick, barely compressed."""
    height, width, channels = pixels.shape
    depth = 8 * pixels.dtype.itemsize
    rows = pixels.astype(">u2") if depth == 16 else pixels
    lines = np.zeros((height, 1 + width * channels * depth // 8), np.uint8)  # each line begins with filter 0
    lines[:, 1:] = np.ascontiguousarray(rows).view(np.uint8).reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPE[channels], 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def json_text(value: object, indent: int | None = None) -> str:
    """JSON to be read by people too: letters as they are, unless a file's name has some that UTF-8 cannot write."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def check_images_target(out: Path, overwrite: bool) -> None:
    """Raise when `out` may not be written to; only a folder of images and metadata is ever replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the images")
    present = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if present and not overwrite:
        raise UserError(f"{out}: exists and is not empty; pass --overwrite or name another folder")
    foreign = [name for name in present if not (name.endswith(".png") or name in METADATA)]
    if foreign:
        raise UserError(
            f"{out}: holds other things than images ({foreign[0]}), so it is not replaced; name another folder"
        )
    check_swappable(out)


@contextmanager
def replaced_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder of images, whole or not at all.

    Args:
        out: Missing, empty, or (with `overwrite`) a folder of images and metadata only.
        overwrite: Whether such a folder may be replaced.
    """
    check_images_target(out, overwrite)
    with swapped_folder(out) as folder:
        yield folder


@contextmanager
def swapped_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and vanishes when it does not."""
    try:
        out = out.resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            yield partial
            partial.chmod(0o777 & ~_umask())
            if out.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
                os.rename(out, old)
                os.rename(partial, out)
                shutil.rmtree(old)
            else:
                os.rename(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); nothing is left there", code=1
        ) from error


def check_writable(out: Path) -> None:
    """Refuse a path that could not be made or written, before any work is done for it; nothing is left there.

    Raises:
        UserError: With the path and the reason.
    """
    out = out.absolute()
    place = out if out.is_dir() else next(path for path in out.parents if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); name another folder", code=1) from error


def check_swappable(out: Path) -> None:
    """Refuse a folder that `swapped_folder` could not put in place, before any work is done for it.

    Raises:
        UserError: With the path and the reason.
    """
    out = out.resolve()
    if out.is_mount():
        raise UserError(f"{out}: something is mounted there, so it cannot be replaced; name a folder in it", code=1)
    check_writable(out)
    check_writable(out.parent)


def check_file_target(path: Path, overwrite: bool) -> None:
    """Raise when no file may be written there."""
    if path.exists() and not (overwrite and path.is_file()):
        raise UserError(f"{path}: exists; pass --overwrite or name another file")
    check_writable(path)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A draft that becomes the file when the block is over, with the rights of new files.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with atomic(path) as draft:
            yield draft
            draft.chmod(0o666 & ~_umask())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})", code=1) from error


def picture_format(path: Path) -> str:
    """The format of a picture to look at, by the suffix of its name; raises UserError for another one."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path}: not the name of a picture; it should end in one of {', '.join(PICTURES)}")
    return PICTURES[path.suffix.lower()]


def save_picture(picture: Any, path: Path | str) -> None:
    """Write a picture to a file, whole or not at all, in the format that its name says."""
    path = Path(path)
    kind = picture_format(path)
    with written(path) as draft:
        picture.save(draft, kind)


def _umask() -> int:
    """The bits that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_images(
    out: str | Path,
    items: Tensor,
    rows: Sequence[Mapping[str, object]] | None = None,
    *,
    mode: str | None = None,
    overwrite: bool = False,
) -> Path:
    """A folder of PNG files 000000.png ... and metadata.jsonl, whole or not at all; `read_images` reads it back.

    Args:
        out: The folder; must be missing or empty, unless `overwrite`.
        items: Images (N, C, H, W) in [-1, 1]; C of 1, 3 or 4.
        rows: What to say of each (label, text, seed ...); `file_name` is put before it.
        mode: "I;16" writes 16 bits; otherwise the channel count says it.
        overwrite: Whether a folder of images and metadata may be replaced.

    Raises:
        UserError: The folder is not empty, or cannot be written.
    """
    said = [{} for _ in range(len(items))] if rows is None else rows
    assert items.ndim == 4 and items.shape[1] in _COLOUR_TYPE and len(said) == len(items), (items.shape, len(said))
    pixels = to_pixels(items, mode)
    digits = max(6, len(str(len(items) - 1)))
    with replaced_folder(Path(out), overwrite) as folder:
        lines: list[str] = []
        for i, row in enumerate(said):
            name = f"{i:0{digits}d}.png"
            (folder / name).write_bytes(png(pixels[i]))
            lines.append(json_text({"file_name": name, **row}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return Path(out)


def sample_sheet(images: Tensor, columns: int | None = None) -> Image.Image:
    """All images side by side, enlarged by a whole number (no smoothing) to about 1000 pixels; transparency on white.

    Args:
        images: (N, C, H, W) in [-1, 1].
        columns: Images per row; default makes the sheet about square.
    """
    count, channels, height, width = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    lines = -(-count // columns)
    scale = max(1, _WIDEST // (columns * (width + 1) + 1))
    gap = max(1, scale // 2)
    pixels = to_pixels(images.clamp(-1, 1)).repeat(scale, 1).repeat(scale, 2)
    high, wide = height * scale + gap, width * scale + gap
    sheet = np.full((lines * high + gap, columns * wide + gap, channels), 255, np.uint8)
    for i, tile in enumerate(pixels):
        top, left = i // columns * high + gap, i % columns * wide + gap
        sheet[top : top + height * scale, left : left + width * scale] = tile
    if channels == 4:
        drawn = Image.fromarray(sheet, "RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
