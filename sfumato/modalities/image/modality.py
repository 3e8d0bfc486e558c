"""The modality of images: grayscale, RGB, RGBA and 16-bit, of any one size."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.config import CodecSettings, DataSettings, Settings
from sfumato.data.conditions import LABEL, Known, Labels
from sfumato.errors import UserError
from sfumato.metrics import Extractor
from sfumato.modalities.base import Animatable, Labelable, Maskable, Modality, PlanContext
from sfumato.modalities.image.builtin import BUILTINS
from sfumato.modalities.image.classifier import MIN_SIDE
from sfumato.modalities.image.codec import ImageCodec
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.evaluator import ImageEvaluator
from sfumato.modalities.image.features import ImageFeatures
from sfumato.modalities.image.labeler import ImageLabeler
from sfumato.modalities.image.masks import read_masks
from sfumato.modalities.image.metrics import reconstruction_report
from sfumato.modalities.image.read import read_images, read_source
from sfumato.modalities.image.write import animation, check_images_output, sample_sheet, to_pixels, write_images
from sfumato.types import Items, Progress

MIN_CODEC_ITEMS = 100_000  # training images that a codec needs; with fewer, the plan chooses a narrower one
CODEC_ITEMS_PER_WIDTH2 = 32  # the same per squared width, because the number of weights grows with it
CODEC_NOMINAL_FLOPS = 75e9  # FLOP/s of codec training, where the plan must not depend on the machine
PERCEPTUAL_FLOPS = 12e3  # FLOPs of the perceptual loss per pixel, averaged over all steps (three in ten compute it)
MIN_LATENT_SIZE = 16  # minimum number of values of a latent
GRAY_COMPRESSION, COLOUR_COMPRESSION = 6, 12  # minimum number of image values per latent value
CODEC_WIDTHS = (32, 48, 64, 96, 128)  # candidates for the codec's width
SHEET_COLUMNS = 8  # columns of a sheet of originals and reconstructions


def downsample_and_channels(shape: tuple[int, ...]) -> tuple[int, int]:
    """Downsampling f and channels c of a grid of about 4 positions a side, or 8 for images of 64 pixels or more.

    The latent has at most 1/12 of the image's values; 1/6 for gray images, which have no redundancy between channels.

    Args:
        shape: (C, H, W) of the images.
    """
    channels, height, width = shape
    side = max(height, width)
    positions_per_side = 4 if side < 64 else 8
    f = 2 ** max(1, math.ceil(math.log2(side / positions_per_side)))
    if side < 16:  # for tiny images, few positions with several channels work better than many with one
        f = min(2 * f, 2 ** math.ceil(math.log2(side)))
    positions = math.ceil(height / f) * math.ceil(width / f)
    compression = GRAY_COMPRESSION if channels == 1 else COLOUR_COMPRESSION
    size = max(MIN_LATENT_SIZE, channels * height * width // compression)
    return f, max(1, min(16, size // positions))


def nominal_throughput(codec: CodecSettings, shape: tuple[int, ...]) -> float:
    """Images per second that a typical machine trains a codec on, estimated from its FLOPs per pixel."""
    width = codec.width or CODEC_WIDTHS[0]
    perceptual = 0 if codec.perceptual == "none" else PERCEPTUAL_FLOPS
    return CODEC_NOMINAL_FLOPS / ((48 * width**2 + perceptual) * shape[1] * shape[2])


def plan_codec(given: Settings, context: PlanContext, seconds: float) -> Settings:
    """The widest codec that is still trained on enough images in the given time.

    The candidates are the narrowest codec without the perceptual loss, which makes steps much slower, and then codecs
    with it, in the order of their width.

    Args:
        given: Settings that the user fixed.
        context: The data and the machine.
        seconds: Training time of the codec.
    """
    f, c = downsample_and_channels(context.shape)
    throughput = context.throughput or (lambda _, settings: nominal_throughput(settings.codec, context.shape))
    codec = CodecSettings(
        bottleneck="kl",
        latent="grid",
        downsample=f,
        channels=c,
        latent_dim=c * 16,
        width=CODEC_WIDTHS[0],
        depth=1,
        kl_weight=1e-3,
        perceptual="none",
        perceptual_weight=2.0,
        adversarial_weight=0.0,
        reconstruction="l1",
        codebook_size=512,
        groups=2 if c % 2 == 0 and not (given.codec.channels or 0) % 2 else 1,
    )
    perceptual, items = "auto" if min(context.shape[1:]) >= MIN_SIDE else "none", math.inf
    for width in [given.codec.width] if given.codec.width else CODEC_WIDTHS:
        candidate = codec.model_copy(update={"width": width, "perceptual": perceptual})
        min_items = max(MIN_CODEC_ITEMS, CODEC_ITEMS_PER_WIDTH2 * width**2)
        if items >= min_items:  # if the narrower one was too slow, so is this one: nothing to measure
            items = seconds * throughput("codec", Settings(codec=candidate))
        if items < min_items:
            break
        codec = candidate
    return Settings(codec=codec)


class ImageModality(Modality[ImageDataset], Maskable[ImageDataset], Animatable, Labelable[ImageDataset], ImageFeatures):
    """Images: grayscale, RGB, RGBA and 16-bit, of any one size."""

    name = "image"
    codec_class = ImageCodec
    codec_share = 0.5
    preview_items = 64
    min_items = 2
    example_output = "samples"

    def recognises(self, source: str) -> bool:
        """Always: images are asked last."""
        return True

    def read(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[ImageDataset, ImageDataset | None]:
        return read_images(
            source,
            resolution=settings.resolution,
            mode=settings.mode,
            label_from=settings.label_from,
            label_column=settings.label_column,
            numeric=settings.numeric,
            categorical=settings.categorical,
            skip_bad=settings.skip_bad,
        )

    def read_split(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[ImageDataset, ImageDataset]:
        return read_source(
            source,
            resolution=settings.resolution,
            mode=settings.mode,
            label_from=settings.label_from,
            label_column=settings.label_column,
            numeric=settings.numeric,
            categorical=settings.categorical,
            skip_bad=settings.skip_bad,
            held_out=settings.held_out,
        )

    def from_samples(self, items: Items, labels: Tensor | None, spec: Any, label_names: list[str]) -> ImageDataset:
        conditions: dict[str, Known] = {} if labels is None else {LABEL: Labels(labels.numpy(), label_names)}
        return ImageDataset(to_pixels(items.stack(), spec), spec, conditions=conditions)

    def plan(self, given: Settings, context: PlanContext, seconds: float) -> Settings:
        return plan_codec(given, context, seconds)

    def codec_config(self, codec: CodecSettings, shape: tuple[int, ...], spec: Any) -> dict[str, Any]:
        return {
            "shape": list(shape),
            "bottleneck": codec.bottleneck,
            "downsample": codec.downsample,
            "channels": codec.channels,
            "latent_dim": codec.latent_dim if codec.latent == "vector" else 0,
            "width": codec.width,
            "depth": codec.depth,
            "codebook_size": codec.codebook_size,
            "groups": codec.groups,
            "levels": None if codec.levels is None else list(codec.levels),
        }

    def evaluator(
        self, train: ImageDataset, device: str | None, progress: Progress | None, target_column: str | None
    ) -> ImageEvaluator:
        return ImageEvaluator(train, device, progress, target_column)

    def reconstruction_metrics(
        self, x: Items, x_hat: Items, spec: Any, features: Extractor | None = None
    ) -> dict[str, float]:
        """PSNR, SSIM, L1 and, with features, the Fréchet distance."""
        return reconstruction_report(x.stack(), x_hat.stack(), features)

    def check_compatible(
        self, name: str, shape: tuple[int, ...], spec: Any, source: object, data: ImageDataset
    ) -> None:
        if (shape, spec) == (data.shape, data.mode):
            return
        formats = ((shape, spec), (data.shape, data.mode))
        expected, found = (f"{width}x{height} {mode}" for (_, height, width), mode in formats)
        remedy = f" (convert these with --set data.resolution={shape[1]} --set data.mode={spec})"
        raise UserError(
            f"{name}: its images are {expected}, but those of {source} are {found}{remedy * (shape[1] == shape[2])}",
            code=1,
        )

    def check_output(self, out: Path, overwrite: bool) -> None:
        check_images_output(out, overwrite)

    def write(self, out: Path, items: Items, metadata: list[dict[str, Any]], spec: Any, overwrite: bool) -> None:
        """A folder of PNG files and `metadata.jsonl`."""
        write_images(out, items.stack(), metadata, mode=spec, overwrite=overwrite)

    def preview(self, items: Items, spec: Any, reconstructed: Items | None = None, columns: int | None = None) -> Any:
        """A grid of images, or of originals, each above its reconstruction."""
        if reconstructed is None:
            return sample_sheet(items.stack(), columns)
        columns = min(columns or SHEET_COLUMNS, len(items))
        count = len(items) // columns * columns  # full rows only
        rows = [v[:count].stack().unflatten(0, (-1, columns)) for v in (items, reconstructed)]
        return sample_sheet(torch.stack(rows, 1).flatten(0, 2), columns)

    def contract_source(self, folder: Path) -> str:
        """Bright squares on a dark background; their position is their class."""
        pixels = np.zeros((48, 8, 8, 3), np.uint8)
        for i in range(len(pixels)):
            pixels[i, 4 * (i % 2) : 4 * (i % 2) + 4, i % 5 : i % 5 + 4, i % 3] = 200 + i
        np.savez(folder / "squares.npz", images=pixels, labels=np.arange(len(pixels)) % 2)
        return str(folder / "squares.npz")

    def is_builtin(self, source: str) -> bool:
        return source in BUILTINS

    def label_values(self, names: Sequence[str]) -> list[Any]:
        """Integers also for built-in data sets with named classes."""
        if any(list(names) == builtin.classes for builtin in BUILTINS.values()):
            return list(range(len(names)))
        return super().label_values(names)

    def read_masks(
        self, path: Path | None, source: str, parts: Sequence[ImageDataset], settings: DataSettings
    ) -> Tensor:
        if path is None:
            raise UserError("--mask is needed: an image, white where to repaint, or a folder of such images")
        return read_masks(path, source, parts, resolution=settings.resolution)

    def animation(self, path: Path) -> Callable[[Items], None]:
        write = animation(path)
        return lambda items: write(items.stack())

    def labeler(
        self,
        given: ImageDataset,
        unlabelled: Sequence[ImageDataset],
        names: Sequence[str],
        target_column: str | None,
        device: str | None,
        progress: Progress | None,
    ) -> ImageLabeler:
        return ImageLabeler(given, unlabelled, names, target_column, device, progress)
