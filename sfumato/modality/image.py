"""Images: how they are planned for, read, measured, written and shown."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import ImageCodec
from sfumato.config import CodecSettings, DataSettings, Settings
from sfumato.data import (
    Data,
    animation,
    check_images_target,
    read_images,
    read_masks,
    read_source,
    sample_sheet,
    write_images,
)
from sfumato.data.write import to_pixels
from sfumato.errors import UserError
from sfumato.metrics import Extractor, reconstruction_report
from sfumato.modality.judge import ImageJudge
from sfumato.modality.row import Facts, Kinds, Modality
from sfumato.modality.sorter import ImageSorter
from sfumato.nn.classifier import SMALLEST

CODEC_ITEMS = 100_000  # images that a codec sees at least, or it is too large for its time
WIDTH_ITEMS = 32  # and the same for the square of its width, as its weights grow
NOMINAL_RATE = 75e9  # operations a second of a codec's training, where the plan must not depend on the machine
FEWEST_NUMBERS = 16  # of a latent, however small the item
GRAY, COLOUR = 6, 12  # values of an image for each number of its latent, at least
CODEC_WIDTHS = (32, 48, 64, 96, 128)
PAIRED = 8  # columns of a sheet of originals and reconstructions


def latent_grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Downsampling f and channels c: a grid of about 4 (from 64 pixels: 8) positions a side.

    Numbers are at most a twelfth of the image's values; of gray images, whose pixels have no colours that go together,
    a sixth.
    """
    channels, height, width = shape
    side = max(height, width)
    aim = 4 if side < 64 else 8
    f = 2 ** max(1, math.ceil(math.log2(side / aim)))
    if side < 16:  # tiny images: few positions with several numbers each work better than many with one
        f = min(2 * f, 2 ** math.ceil(math.log2(side)))
    positions = math.ceil(height / f) * math.ceil(width / f)
    numbers = max(FEWEST_NUMBERS, channels * height * width // (GRAY if channels == 1 else COLOUR))
    return f, max(1, min(16, numbers // positions))


def nominal_pace(codec: CodecSettings, shape: tuple[int, ...]) -> float:
    """Images a second on a usual machine, from about how many operations a step takes per image and pixel."""
    width = codec.width or CODEC_WIDTHS[0]
    features = 0 if codec.perceptual == "none" else 12e3  # of three steps in ten: the others do without
    return NOMINAL_RATE / ((48 * width**2 + features) * shape[1] * shape[2])


def plan(given: Settings, facts: Facts, seconds: float) -> Settings:
    """The largest codec that still sees enough images in its seconds, on few latent numbers.

    The perceptual term, whose feature network needs some pixels, makes steps much slower: the smallest codec is the
    narrowest without it, the next one the narrowest with it.
    """
    f, c = latent_grid(facts.shape)
    pace = facts.pace or (lambda _, settings: nominal_pace(settings.codec, facts.shape))
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
    perceptual, seen = "auto" if min(facts.shape[1:]) >= SMALLEST else "none", math.inf
    for width in [given.codec.width] if given.codec.width else CODEC_WIDTHS:
        larger = codec.model_copy(update={"width": width, "perceptual": perceptual})
        enough = max(CODEC_ITEMS, WIDTH_ITEMS * width**2)
        if seen >= enough:  # a wider one is no faster
            seen = seconds * pace("codec", Settings(codec=larger))
        if seen < enough:
            break
        codec = larger
    return Settings(codec=codec)


def codec_options(codec: CodecSettings, shape: tuple[int, ...], mode: str) -> dict[str, Any]:
    """Arguments of `ImageCodec`."""
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


def read(source: str, settings: DataSettings, mode: str | None = None) -> tuple[Data, Data]:
    """Training and held-out part of a source of images."""
    return read_source(
        source,
        resolution=settings.resolution,
        mode=settings.mode,
        label_from=settings.label_from,
        skip_bad=settings.skip_bad,
        held_out=settings.held_out,
    )


def parts(source: str, settings: DataSettings, mode: str | None = None) -> tuple[Data, Data | None]:
    """All images of a source, and those it holds out itself."""
    return read_images(
        source,
        resolution=settings.resolution,
        mode=settings.mode,
        label_from=settings.label_from,
        skip_bad=settings.skip_bad,
    )


def made(items: Tensor, labels: Tensor | None, mode: str, label_names: list[str]) -> Data:
    """Items as the integers that would be written."""
    return Data(to_pixels(items, mode), mode, None, None if labels is None else labels.numpy(), label_names)


def no_kinds(texts: Sequence[str], balance: str | None, mode: str) -> Kinds:
    """Images have no columns."""
    if balance is not None:
        raise UserError("--balance is for tables; a model with classes goes evenly through them")
    raise UserError(f"--where {texts[0]}: is for tables; of images ask for a class with --label")


def check_fit(name: str, shape: tuple[int, ...], mode: str, source: object, data: Data) -> None:
    """Refuse a source of other images than those of `name` (samples, or what a model makes), of shape (C, H, W)."""
    if (shape, mode) == (data.shape, data.mode):
        return
    ours, theirs = (f"{width}x{height} {kind}" for (_, height, width), kind in ((shape, mode), (data.shape, data.mode)))
    remedy = f" (convert these with --set data.resolution={shape[1]} --set data.mode={mode})"
    raise UserError(
        f"{name}: its images are {ours}, but those of {source} are {theirs}{remedy * (shape[1] == shape[2])}", code=1
    )


def compare(x: Tensor, x_hat: Tensor, mode: str, features: Extractor | None) -> dict[str, float]:
    """PSNR, SSIM, L1 and, with features, the Fréchet distance of reconstructions."""
    return reconstruction_report(x, x_hat, features)


def masks(place: Path | None, source: str, parts: Sequence[Data], settings: DataSettings) -> Tensor:
    """Where images are to be painted anew (N, H, W)."""
    if place is None:
        raise UserError("--mask is needed: an image that is white where to repaint, or a folder of such")
    return read_masks(place, source, parts, resolution=settings.resolution)


def write(out: Path, items: Tensor, rows: list[dict[str, Any]], mode: str, overwrite: bool) -> None:
    """A folder of PNG files."""
    write_images(out, items, rows, mode=mode, overwrite=overwrite)


def sheet(items: Tensor, mode: str, columns: int | None) -> Any:
    """Items side by side."""
    return sample_sheet(items, columns)


def pairs(x: Tensor, x_hat: Tensor, mode: str) -> Any:
    """Originals, each above its reconstruction."""
    columns = min(PAIRED, len(x))
    whole = len(x) // columns * columns
    rows = [v[:whole].unflatten(0, (-1, columns)) for v in (x, x_hat)]
    return sample_sheet(torch.stack(rows, 1).flatten(0, 2), columns)


IMAGE: Modality[Data] = Modality(
    name="image",
    recognises=lambda source: True,
    read=read,
    parts=parts,
    made=made,
    plan=plan,
    codec_share=0.5,
    codec=ImageCodec,
    codec_options=codec_options,
    judge=ImageJudge,
    compare=compare,
    kinds=no_kinds,
    check_fit=check_fit,
    check_target=check_images_target,
    write=write,
    sheet=sheet,
    pairs=pairs,
    shown=64,
    fewest=2,
    example="samples",
    masks=masks,
    animation=animation,
    sorter=ImageSorter,
)
