"""Write images: a folder of PNG files with metadata, a sheet of samples, an animation; whole or not at all."""

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sfumato.data.cache import allocate
from sfumato.data.metadata import METADATA
from sfumato.data.output import check_swappable, draft_file, json_text, swapped_folder
from sfumato.errors import UserError
from sfumato.types import batch_limit

_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}  # PNG colour type of 1, 3 and 4 channels: grey, RGB, RGBA
MAX_SHEET_SIDE = 1024  # width that a sample sheet is enlarged to, at most, pixels
ANIMATION_FORMATS = {".gif": "GIF", ".webp": "WEBP"}
FRAME_MILLISECONDS = 80  # duration of an animation's frame
MIN_FRAME_SIDE = 256  # side that small frames are enlarged to, at least, pixels


def to_pixels(items: Tensor, mode: str | None = None) -> NDArray[Any]:
    """Images (N, C, H, W) in [-1, 1] -> pixels (N, H, W, C): uint8, or uint16 for mode "I;16"."""
    count, channels, height, width = items.shape
    batch_size = batch_limit(items.shape[1:], count)
    if not all(bool(torch.isfinite(part).all()) for part in items.split(batch_size)):
        raise UserError("the images hold NaN or infinite values: nothing written", code=1)
    dtype, half = (np.uint16, 32767.5) if mode == "I;16" else (np.uint8, 127.5)
    pixels, first = allocate((count, height, width, channels), dtype), 0
    for part in items.detach().split(batch_size):  # the pixels may be larger than memory
        scaled = part.to("cpu", torch.float32).add(1).mul_(half).round_().clamp_(0, 2 * half)
        pixels[first : first + len(part)] = scaled.permute(0, 2, 3, 1).numpy()
        first += len(part)
    return pixels


def encode_png(pixels: NDArray[Any]) -> bytes:
    """A PNG file of pixels (H, W, C), uint8 or uint16, with fast compression."""
    height, width, channels = pixels.shape
    depth = 8 * pixels.dtype.itemsize
    rows = pixels.astype(">u2") if depth == 16 else pixels
    lines = np.zeros((height, 1 + width * channels * depth // 8), np.uint8)  # each line starts with filter type 0
    lines[:, 1:] = np.ascontiguousarray(rows).view(np.uint8).reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPE[channels], 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def check_images_output(out: Path, overwrite: bool) -> None:
    """Refuse an output that may not be written; only a folder of images and metadata is ever replaced."""
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


def write_images(
    out: str | Path,
    items: Tensor,
    rows: Sequence[Mapping[str, object]] | None = None,
    *,
    mode: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder of PNG files 000000.png ... and metadata.jsonl, whole or not at all; `read_images` reads it.

    Args:
        out: The folder; must not exist or be empty, unless `overwrite`.
        items: Images (N, C, H, W) in [-1, 1]; C of 1, 3 or 4.
        rows: Metadata of each image (label, text, seed, ...), written after its `file_name`.
        mode: "I;16" writes 16 bits; other modes follow from the channels.
        overwrite: Whether to replace a folder of images and metadata.

    Raises:
        UserError: The folder is not empty, or cannot be written.
    """
    metadata = [{} for _ in range(len(items))] if rows is None else rows
    assert items.ndim == 4 and items.shape[1] in _COLOUR_TYPE, items.shape
    assert len(metadata) == len(items), (len(metadata), len(items))
    pixels = to_pixels(items, mode)
    digits = max(6, len(str(len(items) - 1)))
    check_images_output(Path(out), overwrite)
    with swapped_folder(Path(out)) as folder:
        lines: list[str] = []
        for i, row in enumerate(metadata):
            name = f"{i:0{digits}d}.png"
            (folder / name).write_bytes(encode_png(pixels[i]))
            lines.append(json_text({"file_name": name, **row}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return Path(out)


def sample_sheet(images: Tensor, columns: int | None = None) -> Image.Image:
    """All images in a grid, enlarged by an integer factor (nearest neighbour); transparent pixels on white.

    Args:
        images: (N, C, H, W) in [-1, 1].
        columns: Images per row; default about as many as rows.
    """
    count, channels, height, width = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    scale = max(1, MAX_SHEET_SIDE // (columns * (width + 1) + 1))
    gap = max(1, scale // 2)
    pixels = to_pixels(images.clamp(-1, 1)).repeat(scale, 1).repeat(scale, 2)
    row_step, column_step = height * scale + gap, width * scale + gap
    sheet = np.full((rows * row_step + gap, columns * column_step + gap, channels), 255, np.uint8)
    for i, tile in enumerate(pixels):
        top, left = i // columns * row_step + gap, i % columns * column_step + gap
        sheet[top : top + height * scale, left : left + width * scale] = tile
    return _on_white(_to_image(sheet))


def _to_image(pixels: NDArray[Any]) -> Image.Image:
    """A picture of pixels (H, W, C), uint8."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _on_white(image: Image.Image) -> Image.Image:
    """The image without transparency."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _save_animation(path: Path, images: Tensor) -> None:
    """Write frames (N, C, H, W) in [-1, 1]."""
    file_format = ANIMATION_FORMATS[path.suffix.lower()]
    scale = max(1, -(-MIN_FRAME_SIDE // max(images.shape[2:])))
    pixels = to_pixels(images.clamp(-1, 1))
    frames = [_to_image(frame.repeat(scale, 0).repeat(scale, 1)) for frame in pixels]
    if file_format == "GIF":
        frames = [_on_white(frame) for frame in frames]
    options: dict[str, Any] = {"duration": FRAME_MILLISECONDS, "loop": 0}
    options |= {"lossless": True} if file_format == "WEBP" else {}
    with draft_file(path) as draft:
        frames[0].save(draft, file_format, save_all=True, append_images=frames[1:], **options)


def animation(path: Path) -> Callable[[Tensor], None]:
    """A writer of images (N, C, H, W) in [-1, 1] as an animation in an endless loop.

    Small images are enlarged without smoothing. WebP is lossless; GIF has 256 colours and no transparency.

    Args:
        path: The file; its suffix, .gif or .webp, selects the format.

    Raises:
        UserError: The suffix is another one; or, on writing, the file cannot be written.
    """
    if path.suffix.lower() not in ANIMATION_FORMATS:
        raise UserError(f"{path}: an animation's name ends in {' or '.join(ANIMATION_FORMATS)}")
    return partial(_save_animation, path)
