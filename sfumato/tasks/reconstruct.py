"""Reconstruct real items with a model's codec."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.outputs import PAIRS_PER_SHEET, Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.config import DataSettings
    from sfumato.data.dataset import Dataset
    from sfumato.model import Model
    from sfumato.types import Progress


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
    """Encode and decode items, to see what the codec keeps.

    For images, the peak signal-to-noise ratio (psnr, in dB), the structural similarity (ssim) and the mean absolute
    error (l1, in units of [-1, 1]) compare them with the originals.

    Args:
        model: Folder of the model.
        source: Built-in data set, folder, file or hf://owner/name.
        n: Number of items, held-out ones first (default: all).
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of originals and results (default: OUT-sheet.png).
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The reconstructions and a row for each: `source` (the file's name), `label` and `text` where known, metrics.

    Raises:
        UserError: The model or source does not exist; the items do not fit the model; or the output folder is not empty
            or cannot be written.
    """
    import time

    from sfumato.data.output import save_picture
    from sfumato.distributed import is_main
    from sfumato.tasks.inputs import check_counts, display_name, open_model, source_settings
    from sfumato.tasks.outputs import check_outputs

    start = time.perf_counter()
    check_counts(n=n, batch=batch)
    loaded = open_model(model, device)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source])
    parts = _read(loaded, str(source), source_settings(model, overrides, skip_bad, labels=False), n, seed)
    loaded.modality.check_compatible(display_name(model), loaded.config.shape, loaded.config.spec, source, parts[0])
    items, metadata, pairs, statistics = _reconstruct(loaded, parts, batch, progress)
    if out is not None and is_main():
        loaded.modality.write(out, items, metadata, loaded.config.spec, overwrite)
    if sheet is not None and is_main():
        save_picture(loaded.modality.preview(pairs[0], loaded.config.spec, pairs[1]), sheet)
    return Result(items, metadata, time.perf_counter() - start, statistics)


def _read(model: "Model", source: str, settings: "DataSettings", n: int | None, seed: int) -> "list[Dataset]":
    """All items of a source in order, or n random ones: held-out items, then others."""
    from sfumato.data import split
    from sfumato.metrics.features import random_indices

    train, held_out = model.modality.read(source, settings, model.config.spec)
    if n is None or n >= len(train) + len(held_out or ()):
        return [train] if held_out is None else [train, held_out]
    if held_out is None:
        train, held_out = split(train, settings.held_out)
    first = held_out.subset(random_indices(len(held_out), n, seed))
    return [first] if len(first) == n else [first, train.subset(random_indices(len(train), n - len(first), seed))]


def _reconstruct(
    model: "Model", parts: "list[Dataset]", batch: int, progress: "Progress | None"
) -> "tuple[Tensor, list[dict[str, Any]], tuple[Tensor, Tensor], dict[str, Any]]":
    """Reconstructions (N, ...), metadata, evenly spaced (originals, reconstructions) for the sheet, mean metrics."""
    import torch

    from sfumato.tasks.inputs import ItemBuffer, item_metadata, report_progress

    modality, spec, total, done = model.modality, model.config.spec, sum(map(len, parts)), 0
    stride = -(-total // PAIRS_PER_SHEET)
    items = ItemBuffer(total, model.config.shape)
    pairs: list[Tensor] = []
    metadata: list[dict[str, Any]] = []
    metrics: list[dict[str, float]] = []
    for data in parts:
        for first in range(0, len(data), batch):
            index = range(first, min(first + batch, len(data)))
            x = data.batch(index).data
            x_hat = model.autoencode(x)
            metrics += [modality.reconstruction_metrics(u[None], v[None], spec) for u, v in zip(x, x_hat, strict=True)]
            metadata += item_metadata(modality, data, index)
            shown = slice(-done % stride, None, stride)
            pairs.append(torch.stack([x[shown], x_hat[shown].to(x)]))
            items.append(x_hat)
            done += len(x)
            report_progress(progress, "reconstruct", done, total)
    rounded = [{name: round(value, 4) for name, value in values.items()} for values in metrics]
    metadata = [row | values for row, values in zip(metadata, rounded, strict=True)]
    means: dict[str, Any] = {name: sum(values[name] for values in metrics) / total for name in metrics[0]}
    sheet = torch.cat(pairs, 1)
    return items.items, metadata, (sheet[0], sheet[1]), means | ({"notes": parts[0].notes} if parts[0].notes else {})
