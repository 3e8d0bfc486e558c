"""Reconstruct real items with a model's codec."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.outputs import PAIRS_PER_SHEET, Result

if TYPE_CHECKING:
    from sfumato.data.dataset import Dataset
    from sfumato.model import Model
    from sfumato.types import Items, Progress


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
    from sfumato.tasks.inputs import check_counts, display_name, open_model, read_parts, source_settings
    from sfumato.tasks.outputs import check_outputs

    start = time.perf_counter()
    check_counts(n=n, batch=batch)
    loaded = open_model(model, device)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source])
    settings = source_settings(model, overrides, skip_bad, labels=False)
    parts = read_parts(loaded.modality, str(source), settings, overrides, loaded.config.spec)
    if n is not None and n < sum(map(len, parts)):
        parts = _choose(parts, settings.held_out, n, seed)
    loaded.modality.check_compatible(display_name(model), loaded.config.shape, loaded.config.spec, source, parts[0])
    items, metadata, pairs, statistics = _reconstruct(loaded, parts, batch, progress)
    if out is not None and is_main():
        loaded.modality.write(out, items, metadata, loaded.config.spec, overwrite)
    if sheet is not None and is_main():
        save_picture(loaded.modality.preview(pairs[0], loaded.config.spec, pairs[1]), sheet)
    return Result(items, metadata, time.perf_counter() - start, statistics)


def _choose(parts: "list[Dataset]", fraction: float, n: int, seed: int) -> "list[Dataset]":
    """N random items of a source: held-out items, a fraction of all without a held-out part, then others."""
    from sfumato.data import split
    from sfumato.metrics.features import random_indices

    train, held_out = parts if len(parts) == 2 else split(parts[0], fraction)
    first = held_out.subset(random_indices(len(held_out), n, seed))
    return [first] if len(first) == n else [first, train.subset(random_indices(len(train), n - len(first), seed))]


def _reconstruct(
    model: "Model", parts: "list[Dataset]", batch: int, progress: "Progress | None"
) -> "tuple[Items, list[dict[str, Any]], tuple[Items, Items], dict[str, Any]]":
    """Reconstructions (N, ...), metadata, evenly spaced (originals, reconstructions) for the sheet, mean metrics."""
    from sfumato.tasks.inputs import ItemBuffer, batch_items, batches, item_metadata, report_progress
    from sfumato.types import Items

    modality, spec, total = model.modality, model.config.spec, sum(map(len, parts))
    stride = -(-total // PAIRS_PER_SHEET)
    items = ItemBuffer(total, model.config.shape)
    originals, reconstructions = list[Items](), list[Items]()
    metadata: list[dict[str, Any]] = []
    metrics: list[dict[str, float]] = []
    for data, index in ((part, index) for part in parts for index in batches(range(len(part)), batch)):
        x = batch_items(data, index)
        x_hat = model.autoencode(x)
        metrics += [modality.reconstruction_metrics(x[i : i + 1], x_hat[i : i + 1], spec) for i in range(len(x))]
        metadata += item_metadata(modality, data, index)
        shown = slice(-items.done % stride, None, stride)
        originals.append(x[shown])
        reconstructions.append(x_hat[shown])
        items.append(x_hat)
        report_progress(progress, "reconstruct", items.done, total)
    rounded = [{name: round(value, 4) for name, value in values.items()} for values in metrics]
    metadata = [row | values for row, values in zip(metadata, rounded, strict=True)]
    means: dict[str, Any] = {name: sum(values[name] for values in metrics) / total for name in metrics[0]}
    pairs = Items.concat(originals), Items.concat(reconstructions)
    return items.items, metadata, pairs, means | ({"notes": parts[0].notes} if parts[0].notes else {})
