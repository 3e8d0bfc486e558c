"""`fit`: train a model on a data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato.training.budget import start_clock

if TYPE_CHECKING:
    from sfumato.model import Model


def fit(
    source: str,
    *,
    out: Path,
    budget: str | None = None,
    steps: int | None = None,
    size: Literal["xs", "s", "m", "l", "xl"] | None = None,
    modality: str | None = None,
    label_from: str | None = None,
    label_column: str | None = None,
    categorical: str | None = None,
    numeric: str | None = None,
    exclude: str | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str, int, int, Mapping[str, float]], None] | None = None,
) -> "Model":
    """Train a model on your data: first a codec, then a diffusion model in its latent space.

    The run folder is the model. Without --budget and --steps, training takes ten minutes.

    Args:
        source: Training data: a built-in data set (digits, mnist, fashion-mnist, cifar10), a folder or file of images,
            a table, or hf://owner/name.
        out: Run folder to write.
        budget: Wall-clock budget for everything, such as 90s, 10m or 1h30m.
        steps: Optimizer steps of both stages together, instead of a budget.
        size: Size of the denoiser (default: chosen by the plan).
        modality: Kind of data (default: detected).
        label_from: Regular expression for file names; its first group is the label, or its named groups are conditions.
        label_column: Columns of the images' metadata that are conditions, separated by commas (default: label).
        categorical: Columns to treat as categorical although they hold numbers, separated by commas.
        numeric: Columns to treat as numeric although they look like categories or row identifiers, separated by commas.
        exclude: Columns to ignore, separated by commas.
        skip_bad: Skip unreadable files instead of stopping.
        resume: Continue the interrupted run in this folder exactly.
        overwrite: Replace an existing run in this folder.
        overrides: Fix a setting, such as train.denoiser.lr=3e-4.
        seed: Random seed.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, the total, and metrics to show.

    Returns:
        The trained model.

    Raises:
        UserError: The data or the settings are invalid, or the budget is too small.
    """
    started = start_clock()
    from sfumato.config import apply_overrides, parse_budget, read_settings
    from sfumato.errors import UserError

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if budget is not None and steps is not None:
        raise UserError("give --budget or --steps, not both")
    if steps is not None and steps < 2:
        raise UserError(f"--steps must be at least 2, not {steps}")
    seconds = None if budget is None else parse_budget(budget)
    data = {"label_from": label_from, "label_column": label_column or (), "skip_bad": skip_bad}
    data |= {"categorical": categorical or (), "numeric": numeric or (), "exclude": exclude or ()}
    settings = read_settings({"seed": seed, "modality": modality, "budget_seconds": seconds, "data": data})
    settings = apply_overrides(settings, overrides)

    from sfumato.training.launch import launch

    return launch(
        source,
        Path(out),
        settings,
        steps=steps,
        size=size,
        device=device,
        started=started,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
