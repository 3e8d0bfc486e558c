"""Real items through a model's codec and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.generate import Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.config import DataSettings
    from sfumato.data import Data
    from sfumato.model import Model
    from sfumato.tasks.common import Progress


def reconstruct(
    model: "Path | str | Model",
    source: str | Path,
    *,
    n: int | None = None,
    out: Path | None = None,
    sheet: Path | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 250,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Encode and decode images: see what the codec keeps.

    Peak signal-to-noise ratio (psnr, in dB) and structural similarity (ssim) are to the originals.

    Args:
        model: Folder of the model.
        source: A built-in set, a folder, a file or hf://owner/name.
        n: How many items, held-out ones first (default: all).
        out: Folder to write them to: the items, and metadata.jsonl with the psnr of each.
        sheet: Picture file that shows some originals, each beside its reconstruction (default: OUT-sheet.png).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the choice of n items.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The reconstructions and a row for each: `source` (the file's name), `label` and `text` where known, `psnr`.

    Raises:
        UserError: No such model or source; the source has other images than the model's; the folder is not empty or
            cannot be written.
    """
    import time

    from sfumato.tasks.common import check_counts, check_fit, draw_sheet, is_main, open_model, source_settings, title
    from sfumato.tasks.inputs import check_places

    start = time.perf_counter()
    check_counts(n=n, batch=batch)
    loaded = open_model(model, device)
    sheet = check_places(out, sheet, overwrite)
    parts = _read(source, source_settings(model, overrides, skip_bad, labels=False), n, seed)
    check_fit(title(model), loaded.card.shape, loaded.card.mode, source, parts[0])
    items, rows, pairs, facts = _run(loaded, parts, batch, progress)
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main():
        draw_sheet(loaded, pairs, sheet, 8)
    return Result(items, rows, time.perf_counter() - start, facts)


def _read(source: str | Path, settings: "DataSettings", n: int | None, seed: int) -> "list[Data]":
    """All images of a source in their order, or n at random: held-out ones, then others."""
    from sfumato.data import read_images, split
    from sfumato.metrics.features import pick

    train, held = read_images(
        source,
        resolution=settings.resolution,
        mode=settings.mode,
        label_from=settings.label_from,
        skip_bad=settings.skip_bad,
    )
    if n is None or n >= len(train) + len(held or ()):
        return [train] if held is None else [train, held]
    if held is None:
        train, held = split(train, settings.held_out)
    first = held.subset(pick(len(held), n, seed))
    return [first] if len(first) == n else [first, train.subset(pick(len(train), n - len(first), seed))]


def _run(
    model: "Model", parts: "list[Data]", batch: int, progress: "Progress | None"
) -> "tuple[Tensor, list[dict[str, Any]], Tensor, dict[str, Any]]":
    """Reconstructions (N, ...), a row for each, evenly spread pairs (2 K, ...) for the sheet, and the mean scores."""
    import torch

    from sfumato.metrics import psnr, ssim
    from sfumato.tasks.common import tell
    from sfumato.tasks.inputs import SHOWN, row_of

    total = sum(map(len, parts))
    stride, done, structure = -(-total // SHOWN), 0, 0.0
    items: list[Tensor] = []
    pairs: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for data in parts:
        for first in range(0, len(data), batch):
            index = range(first, min(first + batch, len(data)))
            x = data.batch(index).data
            x_hat = model.reconstruct(x).clamp(-1, 1)
            structure += len(x) * ssim(x, x_hat)
            rows += [
                row_of(data, i) | {"psnr": round(psnr(u[None], v[None]), 3)}
                for i, u, v in zip(index, x, x_hat, strict=True)
            ]
            pairs.append(torch.stack([x, x_hat], 1)[-done % stride :: stride])
            items.append(x_hat)
            done += len(x)
            tell(progress, "reconstruct", done, total)
    facts: dict[str, Any] = {"psnr": sum(row["psnr"] for row in rows) / total, "ssim": structure / total}
    facts |= {"notes": parts[0].notes} if parts[0].notes else {}
    return torch.cat(items), rows, torch.cat(pairs).flatten(0, 1), facts
