"""Masks of images, from image files: white is repainted, black and transparent stay."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from sfumato.data.files import ARCHIVE, Files, first_few, is_image
from sfumato.errors import UserError
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.decode import Pixels, convert_pixels, decode, image_files

WHITE_LEVEL = 2**15  # grey level, of 65535, from which a pixel counts as white


def _pixels(files: Files, name: str, mode: str | None = None) -> Pixels:
    """Pixels (H, W, C) of an image file, at its size."""
    try:
        return decode(files.read(name), None, mode, background="black")[0]
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{files.root}: {name} cannot be read as an image ({type(error).__name__})", code=1) from error


def _mask(files: Files, name: str) -> Pixels:
    """Grey levels (H, W, 1), 0..65535, of a mask file, which is all black or has white pixels."""
    pixels = _pixels(files, name, "I;16")
    brightest = int(pixels.max())
    if 0 < brightest < WHITE_LEVEL:
        found = f"its brightest value is {brightest / 257:.3g} of 255"
        raise UserError(
            f"{files.root}: the mask {name} is nowhere white ({found}); white repaints, black stays", code=1
        )
    return pixels


def _match_names(files: Files, names: Sequence[str], source: str) -> list[str]:
    """For each image name, the mask of the same name, whatever its suffix."""
    if not names:
        raise UserError(f"{source}: its images have no file names to match masks with; name one mask for all", code=1)
    stem = lambda name: PurePosixPath(name).with_suffix("")
    by_stem = {stem(name): name for name in files.names if is_image(name)}
    missing = [name for name in names if stem(name) not in by_stem]
    if missing:
        raise UserError(f"{files.root}: no mask for {first_few(missing)}", code=1)
    return [by_stem[stem(name)] for name in names]


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _file_shapes(source: str, names: Sequence[str]) -> dict[str, Sequence[int]]:
    """Shapes (H, W, C) of image files, by name; empty if the source is no file or folder."""
    path = Path(source).expanduser()
    if not names or not path.exists():
        return {}
    with image_files(path) as files:
        return {name: _pixels(files, name).shape for name in names}


def _resized(mask: Pixels, name: str, size: Sequence[int], file_shape: Sequence[int], resolution: int | None) -> Pixels:
    """A mask (H, W, 1) of the size of the image's file, cropped and resized as the image was."""
    if not resolution or tuple(file_shape[:2]) != mask.shape[:2]:
        file_size = f" (its file {_size(file_shape)})" if resolution and len(file_shape) else ""
        raise UserError(f"{name} is {_size(mask.shape)}; its image is {_size(size)}{file_size}", code=1)
    return convert_pixels(mask, resolution, "I;16")


def read_masks(path: Path, source: str, parts: Sequence[ImageDataset], resolution: int | None = None) -> Tensor:
    """Which pixels of each image are repainted: bool (N, H, W).

    A mask has the size of the images as they were read; or the size of the image's file, and is then cropped and
    resized as the image was.

    Args:
        path: One mask for all images, or a folder or archive of masks named like the images (suffixes may differ).
        source: Where the images are from.
        parts: The images, in consecutive parts.
        resolution: Side that the images were cropped and resized to, if they were.

    Raises:
        UserError: The path does not exist; or a mask is missing, has another size, or is grey without white.
    """
    if not path.exists():
        raise UserError(f"{path}: no such mask file or folder")
    names = [name for data in parts for name in data.names or ()]
    count, size = sum(map(len, parts)), parts[0].shape[1:]
    with image_files(path) as files:
        several = path.is_dir() or ARCHIVE.search(path.name) is not None
        mask_names = _match_names(files, names, source) if several else [path.name] * count
        masks_by_name = {name: _mask(files, name) for name in dict.fromkeys(mask_names)}
    masks = [masks_by_name[name] for name in mask_names]
    mismatched = [i for i, mask in enumerate(masks) if mask.shape[:2] != size]
    file_shapes = _file_shapes(source, [names[i] for i in mismatched] if names else [])
    for i in mismatched:
        file_shape = file_shapes.get(names[i], ()) if names else ()
        masks[i] = _resized(masks[i], f"{path}: the mask {mask_names[i]}", size, file_shape, resolution)
    return torch.from_numpy(np.stack(masks)[..., 0] >= WHITE_LEVEL)
