"""`distill`: turn a model into a few-step model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.training.budget import start_clock

if TYPE_CHECKING:
    from sfumato.model import Model


def distill(
    model: "Path | str | Model",
    *,
    out: Path,
    budget: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str, int, int, Mapping[str, float]], None] | None = None,
) -> "Model":
    """Distill a model into a few-step model, which samples with one to four network evaluations.

    The student learns to jump to the endpoints of the teacher's sampling trajectories, guidance included; no training
    data are needed. An interrupted distillation leaves no files behind.

    Args:
        model: Model folder of the teacher.
        out: Folder of the few-step model to write.
        budget: Wall-clock budget for everything, such as 30s or 2m (default: a fifth of the teacher's training time).
        steps: Optimizer steps, instead of a budget.
        guidance: Classifier-free guidance weight of the teacher (default: the model's own).
        overwrite: Replace an existing model in the output folder.
        seed: Random seed.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, the total, and metrics to show.

    Returns:
        The few-step model. Its sampler is `jump`; every other sampler works too, without a second network evaluation
        for guidance, which is built in.

    Raises:
        UserError: The model cannot be distilled, the budget is too small, or the folder cannot be written.

    References:
        Song et al., Consistency Models, https://arxiv.org/abs/2303.01469 (multistep sampling); Luhman and Luhman,
        Knowledge Distillation in Iterative Generative Models, https://arxiv.org/abs/2101.02388 (learning from the
        teacher's trajectories).
    """
    started = start_clock()
    from sfumato.config import parse_budget
    from sfumato.errors import UserError
    from sfumato.training.distillation import MIN_DISTILL_BUDGET, DistillConfig, distill_model

    if budget is not None and steps is not None:
        raise UserError("give --budget or --steps, not both")
    if steps is not None and steps < 2:
        raise UserError(f"--steps must be at least 2, not {steps}")
    if guidance is not None and guidance < 0:
        raise UserError(f"--guidance must be at least 0, not {guidance}")
    seconds = None if budget is None else parse_budget(budget, MIN_DISTILL_BUDGET)
    return distill_model(
        model, DistillConfig(Path(out), seconds, steps, guidance, overwrite, seed, device), started, progress
    )
