"""How good a model or its samples are, each number beside what real held-out data score."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.data import Data
    from sfumato.modality import Judge
    from sfumato.model import Model
    from sfumato.tasks.common import Progress

MOST, LEAST = 10_000, 1_000  # items that are generated, unless told otherwise
CHECKED, CHECKED_NUMBERS = 2_000, 2**26  # held-out items that the codec is measured on, and numbers in them


def evaluate(
    target: "Path | str | Model",
    source: str | Path,
    *,
    n: int | None = None,
    cas: bool = False,
    column: str | None = None,
    categorical: str | None = None,
    numeric: str | None = None,
    exclude: str | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 500,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> dict[str, Any]:
    """Measure a model, or samples, against real data.

    Each number stands beside its floor, what real held-out data score. Distances are between features: of Inception
    where its weights are at hand, else of a classifier trained on the training part.

    Args:
        target: Folder of a model, or samples: a folder or an .npz file.
        source: The real data: a built-in set, a folder, a file or hf://owner/name.
        n: How many items to generate (default: as many as held out, 1,000 to 10,000) or to take of the samples.
        cas: Also train a classifier on the samples, and test it on held-out data.
        column: Column of a table that --cas foretells from the others (default: the last one).
        categorical: Of samples of a table: its columns that are categories though they look like numbers, separated by
            commas. A model knows these and the following.
        numeric: Likewise columns that are numbers though they look like categories or names of the rows.
        exclude: Likewise columns to leave out.
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of what is generated or drawn.
        batch: Items computed at once.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        What JSON can hold: what `sfumato.metrics.image_report` says; `memorised`, whether the samples look copied from
        the training part; of a model also what its codec keeps of `codec_n` held-out items (`codec_psnr` and others).

    Raises:
        UserError: No such model, samples or source; they do not fit one another; there are no labels for `cas`.
    """
    import time

    from sfumato.errors import UserError
    from sfumato.modality import recognise
    from sfumato.tasks.common import check_counts, open_model, source_settings, title
    from sfumato.tasks.samples import check_samples, draw_samples, read_real, read_samples, relabelled

    start, name = time.perf_counter(), title(target)
    check_counts(batch=batch)
    model = open_model(target, device) if _is_model(target) else None
    said = {"categorical": categorical, "numeric": numeric, "exclude": exclude}
    told = next((key for key, value in said.items() if value is not None), None)
    if model is not None and told is not None:
        raise UserError(f"--{told}: is for samples in a file; a model knows what its columns are")
    settings = source_settings(None if model is None else target, overrides, skip_bad, labels=True, said=said)
    row = recognise(str(source)) if model is None else model.modality
    check_counts(row.fewest, n=n)
    train, held = read_real(row, source, settings, None if model is None else model.card.mode)
    judge = row.judge(train, device or (None if model is None else str(model.device)), progress, column)
    cas = cas or column is not None
    if model is None:
        samples = read_samples(row, str(target), n, skip_bad, train.mode, seed)
        check_samples(row, name, samples, source, (train, held), cas and judge.by_label)
    else:
        check_samples(row, name, model.card, source, (train, held), cas and judge.by_label)
        samples = draw_samples(model, n or min(MOST, max(LEAST, len(held))), seed, batch, progress)
    samples = relabelled(samples, train)
    report = {"target": name, "source": str(source), **judge.report(samples, held, cas, seed)}
    if model is not None:
        report |= _measure_codec(judge, model, held, seed)
    notes = list(dict.fromkeys([*train.notes, *samples.notes]))
    return report | ({"notes": notes} if notes else {}) | {"seconds": round(time.perf_counter() - start, 1)}


def _is_model(target: "Path | str | Model") -> bool:
    """Whether it is a model or the folder of one, finished or not."""
    return not isinstance(target, str | Path) or any((Path(target) / f).is_file() for f in ("model.json", "run.json"))


def _measure_codec(judge: "Judge[Data]", model: "Model", held: "Data", seed: int) -> dict[str, Any]:
    """What the codec keeps of held-out items."""
    from sfumato.metrics.features import pick
    from sfumato.types import at_once

    x = held.batch(pick(len(held), at_once(held.shape, CHECKED, CHECKED_NUMBERS), seed)).data
    return {"codec_n": len(x), **{f"codec_{name}": v for name, v in judge.compare(x, model.autoencode(x)).items()}}
