"""Outpaint: extend images beyond their borders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.inpaint import DEFAULT_RESAMPLE, METHODS, Method, check_one_length, choose_method
from sfumato.tasks.outputs import PAIRS_PER_SHEET, Result

if TYPE_CHECKING:
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.types import Items, Progress, Raw


def outpaint(
    model: "Path | str | Model",
    source: str | Path,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | Sequence[str] | None = None,
    method: Method | None = None,
    steps: int = 25,
    resample: int = DEFAULT_RESAMPLE,
    guidance: float | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 32,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Outpaint: extend images beyond their borders; the original pixels stay unchanged.

    The model inpaints one window of its own size after another; each overlaps existing pixels by at least half. To
    regenerate the surroundings without changing the size, use inpaint.

    Args:
        model: Folder of the model.
        source: Built-in data set, folder, file or hf://owner/name.
        left: Pixels to add on the left.
        right: Pixels to add on the right.
        top: Pixels to add at the top.
        bottom: Pixels to add at the bottom.
        out: Output folder for the items and metadata.jsonl.
        sheet: Contact sheet of the results (default: OUT-sheet.png).
        label: Class of all items, or name=value of a condition; may be given several times (default: as in the source,
            if known).
        method: How the existing pixels are constrained, as in inpaint.
        steps: Sampler steps per window.
        resample: Repetitions of each step with noise added back in between (RePaint); more makes old and new parts fit
            better.
        guidance: Guidance weight; 1 disables it (default: chosen by fit).
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The larger items and a row for each: its `source`, `label` and `text` where known, settings.

    Raises:
        UserError: The model, source or label does not exist; there is nothing to add; the items do not fit the model;
            or the output folder is not empty or cannot be written.
    """
    import time

    from sfumato.conditioners import parse_conditions
    from sfumato.errors import UserError
    from sfumato.modalities.base import Maskable
    from sfumato.tasks.inputs import (
        check_counts,
        item_conditions,
        map_items,
        open_model,
        output_metadata,
        read_items,
        require,
    )
    from sfumato.tasks.outputs import check_outputs, write_items

    start = time.perf_counter()
    _check_borders(left=left, right=right, top=top, bottom=bottom)
    check_counts(steps=steps, resample=resample, batch=batch)
    loaded = open_model(model, device)
    require(loaded, Maskable, "outpaint")
    if len(loaded.config.shape) != 3:
        raise UserError(f"outpaint: not supported for models of modality {loaded.modality.name}")
    check_one_length(loaded, "outpaint")
    method, sampling = choose_method(loaded, method, steps, guidance)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source])
    originals = read_items(model, loaded, source, overrides, skip_bad)
    raw = item_conditions(loaded, label, originals)
    outpainter = _Outpainter(loaded, (top, bottom), (left, right), raw, method, sampling, resample, seed)
    items = map_items(loaded, originals, outpainter, batch, "outpaint", progress)
    settings: dict[str, Any] = {"method": method, "steps": steps, "resample": resample}
    settings |= {"guidance": sampling.guidance, "seed": seed}
    metadata = output_metadata(loaded, originals, raw.only(parse_conditions(loaded.conditioner, label)), settings)
    height, width = items.stack().shape[-2:]
    statistics = settings | {"size": f"{width}x{height}"} | originals.notes()
    write_items(loaded, items, metadata, out, sheet, overwrite, items[:PAIRS_PER_SHEET])
    return Result(items, metadata, time.perf_counter() - start, statistics)


def _check_borders(**pixels: int) -> None:
    """Refuse negative numbers of pixels, and none at all."""
    from sfumato.errors import UserError
    from sfumato.tasks.inputs import check_counts

    check_counts(minimum=0, **pixels)
    if not any(pixels.values()):
        raise UserError("nothing to add: give a number of pixels with --left, --right, --top or --bottom")


@dataclass
class _Outpainter:
    """Extends images (B, C, H, W) window by window.

    Args:
        model: The model.
        vertical: Pixels to add at the top and at the bottom.
        horizontal: Pixels to add on the left and on the right.
        raw: Conditions of the images (N).
        method: A name in `METHODS`.
        sampling: Steps and guidance.
        resample: Repetitions of each step.
        seed: Seed of the noise.
    """

    model: "Model"
    vertical: tuple[int, int]
    horizontal: tuple[int, int]
    raw: "Raw"
    method: str
    sampling: "Sampling"
    resample: int
    seed: int

    def __call__(self, numbers: list[int], items: "Items") -> "Items":
        import torch

        from sfumato.types import Items

        x = items.stack()
        height, width = x.shape[-2:]
        canvas = x.new_zeros(*x.shape[:2], height + sum(self.vertical), width + sum(self.horizontal))
        missing = torch.ones(canvas.shape[-2:], dtype=torch.bool)
        offsets = product(window_offsets(height, *self.vertical), window_offsets(width, *self.horizontal))
        for number, (top, left) in enumerate(offsets):
            window = (..., slice(top, top + height), slice(left, left + width))
            if number == 0:
                canvas[window] = x
            else:
                mask = missing[window].expand(max(numbers) + 1, height, width)
                seed = self.seed + number
                inpainter = METHODS[self.method](self.model, mask, self.raw, self.sampling, self.resample, seed)
                canvas[window] = inpainter(numbers, Items(canvas[window])).stack()
            missing[window] = False
        return Items(canvas)


def window_offsets(size: int, before: int, after: int) -> Iterator[int]:
    """Offsets of windows along an axis: the original's first, then outwards, each overlapping its neighbour by half.

    Args:
        size: Size of a window, and of the original.
        before: Pixels added before the original.
        after: Pixels added after it.
    """
    step = max(1, size // 2)
    yield before
    yield from (max(0, before - k) for k in range(step, before + step, step))
    yield from (before + min(after, k) for k in range(step, after + step, step))
