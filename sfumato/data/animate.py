"""Images one after the other in one file: GIF or WebP."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .write import to_pixels, written

FORMATS = {".gif": "GIF", ".webp": "WEBP"}
MILLISECONDS = 80  # a frame
_SMALLEST = 256  # pixels that small frames are enlarged to at least, by a whole number


def _frame(pixels: np.ndarray, scale: int, opaque: bool) -> Image.Image:
    """One image of pixels (H, W, C), uint8, enlarged without smoothing; on white, if it has to be opaque."""
    large = pixels.repeat(scale, 0).repeat(scale, 1)
    image = Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large)
    if image.mode != "RGBA" or not opaque:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _write(path: Path, images: Tensor) -> None:
    """The file itself, whole or not at all, of frames (N, C, H, W) in [-1, 1]."""
    kind = FORMATS[path.suffix.lower()]
    scale = max(1, -(-_SMALLEST // max(images.shape[2:])))
    frames = [_frame(pixels, scale, kind == "GIF") for pixels in to_pixels(images.clamp(-1, 1))]
    options = {"lossless": True} if kind == "WEBP" else {}
    with written(path) as draft:
        frames[0].save(draft, kind, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, **options)


def animation(path: Path) -> Callable[[Tensor], None]:
    """What writes images (N, C, H, W) in [-1, 1] into a moving picture that starts again at its end.

    Small ones are enlarged without smoothing. WebP keeps every colour, GIF 256 of them and no transparency.

    Args:
        path: Where to; the suffix, .gif or .webp, says the format.

    Raises:
        UserError: Another suffix; or later, when the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: an animation's name ends in {' or '.join(FORMATS)}")
    return partial(_write, path)
