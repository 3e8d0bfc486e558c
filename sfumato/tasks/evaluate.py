"""Evaluate a model or its samples; each metric is shown with its floor, the score of real held-out data."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.data.dataset import Dataset
    from sfumato.modalities.base import Evaluator
    from sfumato.model import Model
    from sfumato.types import Progress

MAX_SAMPLES, MIN_SAMPLES = 10_000, 1_000  # generated items if the user gives no number
MAX_CODEC_ITEMS, MAX_CODEC_VALUES = 2_000, 2**26  # held-out items for the codec's metrics, and values in them


def evaluate(
    model: "Path | str | Model",
    source: str | Path,
    *,
    n: int | None = None,
    cas: bool = False,
    target: str | None = None,
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
    """Evaluate a model, or samples, against real data.

    Each metric is shown with its floor, the score of real held-out data. Features are those of Inception if its weights
    are available, otherwise of a classifier trained on the training part.

    Args:
        model: Folder of a model, or samples: a folder or file.
        source: Real data: built-in data set, folder, file or hf://owner/name.
        n: Number of items to generate (default: as many as held out, 1,000 to 10,000), or to take from the samples.
        cas: Classification accuracy score: train a classifier on the samples, and test it on held-out data.
        target: Target column that --cas predicts (default: the last column).
        categorical: Columns of sample files to treat as categorical although they hold numbers, separated by commas.
        numeric: Columns of sample files to treat as numeric although they look like categories or row identifiers,
            separated by commas.
        exclude: Columns of sample files to ignore, separated by commas.
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        A JSON object: the report of the modality's evaluator; `memorised`, whether the samples look copied from the
        training part; for a model also how well its codec reconstructs `codec_n` held-out items (`codec_psnr`, ...).

    Raises:
        UserError: The model, samples or source do not exist; they do not fit each other; there are no labels for --cas.
    """
    import time

    from sfumato.errors import UserError
    from sfumato.modalities import recognise
    from sfumato.tasks.evaluation import check_samples, draw_samples, match_labels, read_real, read_samples
    from sfumato.tasks.inputs import check_counts, display_name, open_model, source_settings

    start, name = time.perf_counter(), display_name(model)
    check_counts(batch=batch)
    loaded = open_model(model, device) if _is_model(model) else None
    columns = {"categorical": categorical, "numeric": numeric, "exclude": exclude}
    given = next((key for key, value in columns.items() if value is not None), None)
    if loaded is not None and given is not None:
        raise UserError(f"--{given} applies only to sample files; a model already stores its column types")
    settings = source_settings(None if loaded is None else model, overrides, skip_bad, labels=True, columns=columns)
    modality = recognise(str(source)) if loaded is None else loaded.modality
    check_counts(modality.min_items, n=n)
    train, held_out = read_real(modality, source, settings, None if loaded is None else loaded.config.spec)
    evaluator = modality.evaluator(train, device or (None if loaded is None else str(loaded.device)), progress, target)
    cas = cas or target is not None
    if loaded is None:
        samples = read_samples(modality, str(model), n, skip_bad, train.spec, seed)
        check_samples(modality, name, samples, source, (train, held_out), cas and evaluator.by_label)
    else:
        check_samples(modality, name, loaded.config, source, (train, held_out), cas and evaluator.by_label)
        samples = draw_samples(loaded, n or min(MAX_SAMPLES, max(MIN_SAMPLES, len(held_out))), seed, batch, progress)
    samples = match_labels(samples, train)
    report = {"model": name, "source": str(source), **evaluator.report(samples, held_out, cas, seed)}
    if loaded is not None:
        report |= _codec_metrics(evaluator, loaded, held_out, seed)
    notes = list(dict.fromkeys([*train.notes, *samples.notes]))
    return report | ({"notes": notes} if notes else {}) | {"seconds": round(time.perf_counter() - start, 1)}


def _is_model(model: "Path | str | Model") -> bool:
    """Whether it is a model or the folder of one, finished or not."""
    return not isinstance(model, str | Path) or any((Path(model) / f).is_file() for f in ("model.json", "run.json"))


def _codec_metrics(evaluator: "Evaluator[Dataset]", model: "Model", held_out: "Dataset", seed: int) -> dict[str, Any]:
    """How well the codec reconstructs held-out items."""
    from sfumato.metrics.features import random_indices
    from sfumato.tasks.inputs import batch_items
    from sfumato.types import batch_limit

    count = batch_limit(held_out.shape, MAX_CODEC_ITEMS, MAX_CODEC_VALUES)
    x = batch_items(held_out, random_indices(len(held_out), count, seed))
    metrics = evaluator.reconstruction_metrics(x, model.autoencode(x))
    return {"codec_n": len(x), **{f"codec_{name}": value for name, value in metrics.items()}}
