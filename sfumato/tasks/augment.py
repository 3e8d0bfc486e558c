"""A small labelled set made larger and balanced: by open items whose class is sure, and by made ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.generate import Result

if TYPE_CHECKING:
    from sfumato.model import Model
    from sfumato.tasks.common import Progress

SHOWN = 100  # made items on a sheet


def augment(
    model: "Path | str | Model",
    source: str | Path,
    *,
    out: Path | None = None,
    n: int | None = None,
    unlabelled: Path | str | None = None,
    no_guess: bool = False,
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
    """Make a labelled set larger and balanced: given items, and others up to the same number in each class.

    The others are images without a label first: those of the source (a folder unlabelled/, an open label) and those of
    --unlabelled. A classifier learns from them and from the given ones, and those whose class it is sure of are taken.
    What is short then is made. A made item is refused when the classifier does not see its class in it, and when it is
    nearer to a given item, or to another made one, than 99 in 100 real ones are to their neighbours.

    Args:
        model: Folder of the model.
        source: The labelled set: a built-in set, a folder, a file (images or a table) or hf://owner/name; a part that
            it holds out itself is left alone.
        out: Where to write the set: a folder of images, or a table.
        n: Items of each class in the set, given ones included (default: as many as the largest class has, at least
            1,000).
        unlabelled: More images, whose labels are not known or do not count.
        no_guess: Take no images without a label into the set; the classifier still learns from them.
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
        The given items that have a label, then those whose label is guessed, then the made ones, and a row for each:
        `label`; of given ones `source`, the file; of guessed ones also `guessed`; of made ones `item`, its number, and
        the settings. The facts say how many were guessed, how many made and tried for it, how many of these refused and
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
    from sfumato.tasks.sorting import Guessed, Maker, fill, guess, read_given

    begun = time.perf_counter()
    check_counts(n=n, steps=steps, batch=batch)
    loaded = open_model(model, device)
    how = sampling(loaded, steps, guidance, sampler, autoguidance)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source, unlabelled])
    given = read_given(model, loaded, source, unlabelled, target, overrides, skip_bad, progress)
    short, guessed = given.short(n), Guessed(given.items[:0])
    if not no_guess:
        guessed, short = guess(given, short, seed, progress)
    made = fill(Maker(loaded, given.sorter, how, seed, batch), short, progress)
    items = torch.cat([given.items, guessed.items, made.items])
    rows = given.rows + guessed.rows + made.rows(given.sorter, vars(how) | {"seed": seed})
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main() and len(made.items):
        save_picture(loaded.modality.sheet(made.items[:SHOWN], loaded.card.mode, None), sheet)
    facts: dict[str, Any] = {
        "given": len(given.items),
        "guessed": len(guessed.items),
        **made.facts(given.sorter),
        **given.facts,
    }
    return Result(items, rows, time.perf_counter() - begun, facts)
