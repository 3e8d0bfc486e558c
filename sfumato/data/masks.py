"""Masks of images, read from image files: white is to be painted anew, black and transparent stays."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .base import Data
from .decode import Pixels, decode, reshape
from .files import ARCHIVE, Files, first_few, is_image, open_files

WHITE = 2**15  # from this grey on (of 65535) a pixel counts as white


def _open(place: Path) -> Files:
    """The files of a folder or an archive, or the one file."""
    if place.is_dir() or ARCHIVE.search(place.name):
        return open_files(place)
    return Files(place, [place.name], lambda name: place.with_name(name).read_bytes(), str(place))


def _pixels(files: Files, name: str, mode: str | None = None) -> Pixels:
    """An image file's pixels (H, W, C) at the size it has."""
    try:
        return decode(files.read(name), None, mode, ground="black")[0]
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{files.root}: {name} cannot be read as an image ({type(error).__name__})", code=1) from error


def _mask(files: Files, name: str) -> Pixels:
    """A mask file's greys (H, W, 1), 0..65535: all black, or somewhere white."""
    pixels = _pixels(files, name, "I;16")
    brightest = int(pixels.max())
    if 0 < brightest < WHITE:
        found = f"its brightest value is {brightest / 257:.3g} of 255"
        raise UserError(
            f"{files.root}: the mask {name} is nowhere white ({found}); white repaints, black stays", code=1
        )
    return pixels


def _beside(files: Files, names: Sequence[str], source: str) -> list[str]:
    """Of each image the mask called like it, whatever the suffix."""
    if not names:
        raise UserError(f"{source}: its images have no file names that masks could bear; name one mask for all", code=1)
    stem = lambda name: PurePosixPath(name).with_suffix("")
    by_stem = {stem(name): name for name in files.names if is_image(name)}
    missing = [name for name in names if stem(name) not in by_stem]
    if missing:
        raise UserError(f"{files.root}: no mask for {first_few(missing)}", code=1)
    return [by_stem[stem(name)] for name in names]


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _originals(source: str, names: Sequence[str]) -> dict[str, Sequence[int]]:
    """Shapes of some images' files; none where the source is not of files."""
    place = Path(source).expanduser()
    if not names or not place.exists():
        return {}
    with _open(place) as files:
        return {name: _pixels(files, name).shape for name in names}


def _resized(mask: Pixels, what: str, size: Sequence[int], original: Sequence[int], side: int | None) -> Pixels:
    """A mask (H, W, 1) of the size of an image's file, cropped and resized as that was."""
    if not side or tuple(original[:2]) != mask.shape[:2]:
        wanted = f" (its file {_size(original)})" if side and len(original) else ""
        raise UserError(f"{what} is {_size(mask.shape)}; its image is {_size(size)}{wanted}", code=1)
    return reshape(mask, side, "I;16")


def read_masks(place: Path, source: str, parts: Sequence[Data], resolution: int | None = None) -> Tensor:
    """Where each image of a source is to be painted anew, (N, H, W) bool.

    A mask has the size of the images as they were read; or that of the image's file, and is then cropped and resized as
    the image was.

    Args:
        place: A mask for all images; or a folder or archive of masks called like the images (suffixes may differ).
        source: Where the images are from.
        parts: The images, in parts that follow one another.
        resolution: What the images were resized to, if they were.

    Raises:
        UserError: There is no such file, no mask for an image, one of another size, or one that is grey at most.
    """
    if not place.exists():
        raise UserError(f"{place}: no such mask file or folder")
    names = [name for data in parts for name in data.names or ()]
    count, size = sum(map(len, parts)), parts[0].shape[1:]
    with _open(place) as files:
        several = place.is_dir() or ARCHIVE.search(place.name) is not None
        chosen = _beside(files, names, source) if several else [place.name] * count
        found = {name: _mask(files, name) for name in dict.fromkeys(chosen)}
    other = [i for i, name in enumerate(chosen) if found[name].shape[:2] != size]
    originals = _originals(source, [names[i] for i in other] if names else [])
    masks = [found[name] for name in chosen]
    for i in other:
        original = originals.get(names[i], ()) if names else ()
        masks[i] = _resized(masks[i], f"{place}: the mask {chosen[i]}", size, original, resolution)
    return torch.from_numpy(np.stack(masks)[..., 0] >= WHITE)
