"""Augment a small labelled set: pseudo-labelled items first, then generated ones, until its classes are balanced."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.outputs import ITEMS_PER_SHEET, Result

if TYPE_CHECKING:
    from sfumato.model import Model
    from sfumato.types import Progress


def augment(
    model: "Path | str | Model",
    source: str | Path,
    *,
    out: Path | None = None,
    n: int | None = None,
    unlabelled: Path | str | None = None,
    no_pseudo_labels: bool = False,
    target: str | None = None,
    sheet: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    autoguidance: float | None = None,
    sampler: str | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 500,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Augment a labelled set until all classes have the same number of items.

    First come unlabelled images, from the source (a folder unlabelled/, or missing labels) and from --unlabelled: a
    classifier is trained on all images, and those with a confident prediction are added under that pseudo-label. The
    model then generates what is still missing. A generated item is rejected if the classifier predicts another class,
    or if it is nearer to a real or another generated item than 99 % of the real items are to their nearest neighbour.

    Args:
        model: Folder of the model.
        source: Labelled set: built-in data set, folder, file or hf://owner/name. Its own held-out part is not used.
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        n: Items per class, real ones included (default: the size of the largest class, at least 1,000).
        unlabelled: Further images; their labels, if any, are ignored.
        no_pseudo_labels: Do not add unlabelled images; the classifier is still trained on them.
        target: Table column that holds the classes (default: the last column).
        sheet: Contact sheet of generated items (default: OUT-sheet.png).
        steps: Sampler steps (default: chosen by fit).
        guidance: Guidance weight; 1 disables it (default: chosen by fit).
        autoguidance: Autoguidance weight; 1 disables it and halves the network evaluations (default: chosen by fit).
        sampler: ddpm, ddim, euler, heun, dpmpp_2m, unipc, abm2 or sde; jump for few-step models (default: chosen by
            fit).
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The real labelled items, then the pseudo-labelled, then the generated ones, and a row for each: `label`; for
        real items `source`, the file; for pseudo-labelled items also `guessed`; for generated items `item`, their
        number, and settings. The statistics count `given`, `guessed` and `made` items; `tried`, the generated ones;
        `refused`, the rejected ones by reason (`label`: another class predicted; `copy`: near a real item; `double`:
        near a generated item); and `short`, the items that a given-up class still lacks. A class is given up after 50
        tries per missing item (at least 200 in all), or after 1,000 tries of which fewer than 1 in 200 were accepted.

    Raises:
        UserError: The model, source or column does not exist; the items do not fit the model, have no labels or one
            class; the model has no classes; or the output folder is not empty or cannot be written.
    """
    import time

    from sfumato.tasks.augmentation import ItemGenerator, LabelledItems, fill_classes, pseudo_label, read_labelled
    from sfumato.tasks.inputs import check_counts, open_model
    from sfumato.tasks.outputs import check_outputs, write_items
    from sfumato.types import Items

    start = time.perf_counter()
    check_counts(n=n, steps=steps, batch=batch)
    loaded = open_model(model, device)
    sampling = loaded.choose_sampling(steps, guidance, sampler, autoguidance)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source, unlabelled])
    labelled = read_labelled(model, loaded, source, unlabelled, target, overrides, skip_bad, progress)
    shortfall, pseudo_labelled = labelled.shortfall(n), LabelledItems(labelled.items[:0], [])
    if not no_pseudo_labels:
        pseudo_labelled, shortfall = pseudo_label(labelled, shortfall, seed, progress)
    generator = ItemGenerator(loaded, labelled.labeler, sampling, seed, batch)
    generated = fill_classes(generator, shortfall, progress)
    items = Items.concat([labelled.items, pseudo_labelled.items, generated.items])
    metadata = labelled.metadata + pseudo_labelled.metadata + generated.metadata(generator)
    shown = generated.items[:ITEMS_PER_SHEET]
    write_items(loaded, items, metadata, out, sheet if len(shown) else None, overwrite, shown)
    statistics: dict[str, Any] = {
        "given": len(labelled.items),
        "guessed": len(pseudo_labelled.items),
        **generated.statistics(labelled.labeler),
        **labelled.statistics,
    }
    return Result(items, metadata, time.perf_counter() - start, statistics)
