"""`fit`: from data to a model folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato.training.clock import begin

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
    """Train a model on your data: first a codec, then diffusion in its latent space.

    The run folder is the model. Without --budget and --steps, ten minutes are taken.

    Args:
        source: A built-in set (digits, mnist, fashion-mnist, cifar10), a folder, a file (images or a table) or
            hf://owner/name.
        out: Folder of the run.
        budget: Wall clock for everything, such as 90s, 10m or 1h30m.
        steps: Optimizer steps of both stages together, in place of a budget.
        size: Size of the denoiser (default: from the plan).
        modality: Kind of data (default: recognised).
        label_from: Regular expression over file names; its first group is the label.
        categorical: Columns of a table that are categories though they look like numbers, separated by commas.
        numeric: Columns of a table that are numbers though they look like categories or names of the rows, likewise.
        exclude: Columns of a table to leave out, separated by commas.
        skip_bad: Leave out files that cannot be read.
        resume: Go on with the run in this folder, exactly.
        overwrite: Replace the run in this folder.
        overrides: Fix a setting, such as train.denoiser.lr=3e-4.
        seed: Seed of everything that is drawn.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, how much there is, and numbers to show.

    Returns:
        The trained model.

    Raises:
        UserError: What is wrong with the data or the settings, and what to do.
    """
    start = begin()
    from sfumato.config import apply_overrides, parse_budget, read_settings
    from sfumato.errors import UserError

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude one another")
    if budget is not None and steps is not None:
        raise UserError("give --budget or --steps, not both")
    if steps is not None and steps < 2:
        raise UserError(f"--steps must be at least 2, not {steps}")
    seconds = None if budget is None else parse_budget(budget)
    data = {"label_from": label_from, "skip_bad": skip_bad}
    data |= {"categorical": categorical or (), "numeric": numeric or (), "exclude": exclude or ()}
    given = read_settings({"seed": seed, "modality": modality, "budget_seconds": seconds, "data": data})
    settings = apply_overrides(given, overrides)

    from sfumato.training.run import run

    return run(
        source,
        Path(out),
        settings,
        steps=steps,
        size=size,
        device=device,
        started=start,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
