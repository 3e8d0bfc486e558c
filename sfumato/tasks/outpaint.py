"""Images continued beyond their borders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.generate import Result
from sfumato.tasks.inpaint import METHODS, RESAMPLE, Method, repainting

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.model import Model, Sampling
    from sfumato.tasks.common import Progress


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
    label: str | None = None,
    method: Method | None = None,
    steps: int = 25,
    resample: int = RESAMPLE,
    guidance: float | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 32,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Continue images beyond their borders; what is given comes back as it was, in the middle of more.

    The model sees one window of its own size after another, each at most half beyond what is there already. To paint
    the surroundings within the images' own size, use inpaint.

    Args:
        model: Folder of the model.
        source: A built-in set, a folder, a file or hf://owner/name.
        left: Pixels to add at the left.
        right: Pixels to add at the right.
        top: Pixels to add at the top.
        bottom: Pixels to add at the bottom.
        out: Folder to write them to: the items, and metadata.jsonl.
        sheet: Picture file that shows some of them (default: OUT-sheet.png).
        label: Class of all items (default: as the source says; none where it does not).
        method: How what is there is heeded, as of inpaint.
        steps: Steps of the sampler, for each window.
        resample: How often each step is taken, with noise put back in between: more fits new and old together.
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the noise.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The larger items and a row for each: its `source`, `label` and `text` where known, the settings.

    Raises:
        UserError: No such model, source or label; nothing to add; the source has other items than the model's; the
            folder is not empty or cannot be written.
    """
    import time

    from sfumato.data import save_picture
    from sfumato.errors import UserError
    from sfumato.tasks.common import check_counts, is_main, open_model
    from sfumato.tasks.inputs import SHOWN, changed, changed_rows, class_numbers, offered, read_inputs
    from sfumato.tasks.places import check_places

    begun = time.perf_counter()
    check_counts(least=0, left=left, right=right, top=top, bottom=bottom)
    check_counts(steps=steps, resample=resample, batch=batch)
    if not left + right + top + bottom:
        raise UserError("nothing to add: say how many pixels with --left, --right, --top or --bottom")
    loaded = open_model(model, device)
    offered(loaded, loaded.modality.masks if len(loaded.card.shape) == 3 else None, "outpaint")
    method, how = repainting(loaded, method, steps, guidance)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source])
    inputs = read_inputs(model, loaded, source, overrides, skip_bad)
    labels = class_numbers(loaded, label, inputs)
    change = _Windows(loaded, (top, bottom), (left, right), labels, method, how, resample, seed)
    items = changed(loaded, inputs, change, batch, "outpaint", progress)
    facts: dict[str, Any] = {"method": method, "steps": steps, "resample": resample}
    facts |= {"guidance": how.guidance, "seed": seed}
    rows = changed_rows(loaded, inputs, None if label is None else labels, facts)
    facts |= {"size": f"{items.shape[-1]}x{items.shape[-2]}"} | inputs.told()
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main():
        save_picture(loaded.modality.sheet(items[:SHOWN], loaded.card.mode, None), sheet)
    return Result(items, rows, time.perf_counter() - begun, facts)


@dataclass
class _Windows:
    """Images (B, C, H, W) to larger ones, window by window."""

    model: "Model"
    rows: tuple[int, int]
    columns: tuple[int, int]
    labels: "Tensor | None"
    method: str
    how: "Sampling"
    resample: int
    seed: int

    def __call__(self, items: list[int], x: "Tensor") -> "Tensor":
        import torch

        height, width = x.shape[-2:]
        canvas = x.new_zeros(*x.shape[:2], height + sum(self.rows), width + sum(self.columns))
        missing = torch.ones(canvas.shape[-2:], dtype=torch.bool)
        places = product(offsets(height, *self.rows), offsets(width, *self.columns))
        for number, (first, left) in enumerate(places):
            window = (..., slice(first, first + height), slice(left, left + width))
            if number == 0:
                canvas[window] = x
            else:
                mask = missing[window].expand(max(items) + 1, height, width)
                fill = METHODS[self.method](self.model, mask, self.labels, self.how, self.resample, self.seed + number)
                canvas[window] = fill(items, canvas[window])
            missing[window] = False
        return canvas


def offsets(size: int, before: int, after: int) -> Iterator[int]:
    """Where windows of a size begin along an axis that goes on so far before and after: the given one first, outwards.

    Each overlaps the one it continues by half at least.
    """
    step = max(1, size // 2)
    yield before
    yield from (max(0, before - k) for k in range(step, before + step, step))
    yield from (before + min(after, k) for k in range(step, after + step, step))
