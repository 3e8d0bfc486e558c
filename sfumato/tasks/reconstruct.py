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
    """Encode and decode items: see what the codec keeps.

    Of images, peak signal-to-noise ratio (psnr, in dB), structural similarity (ssim) and mean absolute error (l1, in
    units of [-1, 1]) are to the originals.

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
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The reconstructions and a row for each: `source` (the file's name), `label` and `text` where known, `psnr`.

    Raises:
        UserError: No such model or source; the source has other images than the model's; the folder is not empty or
            cannot be written.
    """
    import time

    from sfumato.data import save_picture
    from sfumato.tasks.common import check_counts, is_main, open_model, source_settings, title
    from sfumato.tasks.places import check_places

    start = time.perf_counter()
    check_counts(n=n, batch=batch)
    loaded = open_model(model, device)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source])
    parts = _read(loaded, str(source), source_settings(model, overrides, skip_bad, labels=False), n, seed)
    loaded.modality.check_fit(title(model), loaded.card.shape, loaded.card.mode, source, parts[0])
    items, rows, pairs, facts = _run(loaded, parts, batch, progress)
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main():
        save_picture(loaded.modality.pairs(*pairs, loaded.card.mode), sheet)
    return Result(items, rows, time.perf_counter() - start, facts)


def _read(model: "Model", source: str, settings: "DataSettings", n: int | None, seed: int) -> "list[Data]":
    """All items of a source in their order, or n at random: held-out ones, then others."""
    from sfumato.data import split
    from sfumato.metrics.features import pick

    train, held = model.modality.parts(source, settings, model.card.mode)
    if n is None or n >= len(train) + len(held or ()):
        return [train] if held is None else [train, held]
    if held is None:
        train, held = split(train, settings.held_out)
    first = held.subset(pick(len(held), n, seed))
    return [first] if len(first) == n else [first, train.subset(pick(len(train), n - len(first), seed))]


def _run(
    model: "Model", parts: "list[Data]", batch: int, progress: "Progress | None"
) -> "tuple[Tensor, list[dict[str, Any]], tuple[Tensor, Tensor], dict[str, Any]]":
    """Reconstructions (N, ...), a row for each, evenly spread originals and theirs for the sheet, the mean scores."""
    import torch

    from sfumato.tasks.common import Collected, tell
    from sfumato.tasks.inputs import SHOWN, rows_of

    row, mode, total, done = model.modality, model.card.mode, sum(map(len, parts)), 0
    stride = -(-total // SHOWN)
    items = Collected(total, model.card.shape)
    pairs: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    scores: list[dict[str, float]] = []
    for data in parts:
        for first in range(0, len(data), batch):
            index = range(first, min(first + batch, len(data)))
            x = data.batch(index).data
            x_hat = model.autoencode(x)
            scores += [row.compare(u[None], v[None], mode, None) for u, v in zip(x, x_hat, strict=True)]
            rows += rows_of(data, index)
            few = slice(-done % stride, None, stride)
            pairs.append(torch.stack([x[few], x_hat[few].to(x)]))
            items.append(x_hat)
            done += len(x)
            tell(progress, "reconstruct", done, total)
    rows = [facts | {k: round(v, 4) for k, v in score.items()} for facts, score in zip(rows, scores, strict=True)]
    means: dict[str, Any] = {name: sum(score[name] for score in scores) / total for name in scores[0]}
    shown = torch.cat(pairs, 1)
    return items.items, rows, (shown[0], shown[1]), means | ({"notes": parts[0].notes} if parts[0].notes else {})
