"""A small labelled set made larger and balanced: given items, and made ones that show their class and copy nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.generate import Result

if TYPE_CHECKING:
    from sfumato.model import Model
    from sfumato.tasks.common import Progress

LEAST = 1_000  # items of each class, unless told otherwise
SHOWN = 100  # made items on a sheet


def augment(
    model: "Path | str | Model",
    source: str | Path,
    *,
    out: Path | None = None,
    n: int | None = None,
    unlabelled: Path | str | None = None,
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
    """Make a labelled set larger and balanced: given items, and made ones up to the same number in each class.

    A made item is refused when a classifier of the given ones does not see its class in it, and when it is nearer to a
    given item, or to another made one, than 99 in 100 real ones are to their neighbours. The classifier also learns
    from images without a label: those of the source (a folder unlabelled/, an open label) and those of --unlabelled.

    Args:
        model: Folder of the model.
        source: The labelled set: a built-in set, a folder, a file (images or a table) or hf://owner/name; a part that
            it holds out itself is left alone.
        out: Where to write the set: a folder of images, or a table.
        n: Items of each class in the set, given ones included (default: as many as the largest class has, at least
            1,000).
        unlabelled: More images, whose labels are not known or do not count.
        target: Column of a table that holds the classes (default: the last one).
        sheet: Picture file that shows some made items (default: OUT-sheet.png).
        steps: Steps of the sampler (default: what fit chose).
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        autoguidance: Weight by which the model's weaker self is left behind; 1 is off, with half the calls of a network
            (default: what fit chose).
        sampler: ddpm, ddim, euler, heun, dpmpp_2m, unipc, abm2 or sde; jump for few-step models (default: what fit
            chose).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the noise.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The given items that have a label, then the made ones, and a row for each: `label`; of given ones `source`, the
        file; of made ones `item`, its number, and the settings. The facts say how many were tried, how many refused and
        why (`label`: another class seen; `copy`: near a given item; `double`: near another made one), and how many are
        still missing of a class (`short`) that was given up: after 50 tries for each item it needs (at least 200), or
        as soon as, after 1,000 tries for it, fewer than 1 in 200 were good.

    Raises:
        UserError: No such model, source or column; the source has other items than the model's, no labels, or one
            class; the model knows no classes; the folder is not empty or cannot be written.
    """
    import time

    import torch

    from sfumato.data import save_picture
    from sfumato.tasks.common import check_counts, is_main, open_model
    from sfumato.tasks.generate import sampling
    from sfumato.tasks.places import check_places
    from sfumato.tasks.sorting import Maker, fill, read_given

    begun = time.perf_counter()
    check_counts(n=n, steps=steps, batch=batch)
    loaded = open_model(model, device)
    how = sampling(loaded, steps, guidance, sampler, autoguidance)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source, unlabelled])
    given = read_given(model, loaded, source, unlabelled, target, overrides, skip_bad, progress)
    wanted = max(LEAST, max(given.counts)) if n is None else n
    made = fill(Maker(loaded, given.sorter, how, seed, batch), given.counts, wanted, progress)
    items = torch.cat([given.items, made.items])
    rows = given.rows + made.rows(given.sorter, vars(how) | {"seed": seed})
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main() and len(made.items):
        save_picture(loaded.modality.sheet(made.items[:SHOWN], loaded.card.mode, None), sheet)
    facts: dict[str, Any] = {"given": len(given.items), **made.facts(given.sorter), **given.facts}
    return Result(items, rows, time.perf_counter() - begun, facts)
