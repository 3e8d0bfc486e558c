"""`distill`: from a model to one that needs few calls of its network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.training.clock import begin

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
    """Turn a model into one that makes new items in one to four calls of its network.

    The few-step model learns to jump to the ends of the trajectories that the model itself takes from noise to data,
    its guidance built in; no data are needed. Interrupted, it leaves nothing behind.

    Args:
        model: Folder of the model.
        out: Folder of the few-step model.
        budget: Wall clock for everything, such as 30s or 2m (default: a fifth of what the model's training took).
        steps: Optimizer steps, in place of a budget.
        guidance: Weight of the condition that is built in (default: what the model uses).
        overwrite: Replace the model in the output folder.
        seed: Seed of everything that is drawn.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, how much there is, and numbers to show.

    Returns:
        The few-step model. It is sampled by `jump`; every other sampler works on it too, one call a step fewer where
        the model took guidance.

    Raises:
        UserError: No such model, or it cannot be distilled; too small a budget; the folder cannot be written.

    References:
        Song et al., Consistency Models, https://arxiv.org/abs/2303.01469 (jumps with new noise between them); Luhman
        and Luhman, Knowledge Distillation in Iterative Generative Models, https://arxiv.org/abs/2101.02388 (learning
        from whole trajectories of the teacher).
    """
    started = begin()
    from sfumato.config import parse_budget
    from sfumato.errors import UserError
    from sfumato.training.distilling import SMALLEST, Wish, run

    if budget is not None and steps is not None:
        raise UserError("give --budget or --steps, not both")
    if steps is not None and steps < 2:
        raise UserError(f"--steps must be at least 2, not {steps}")
    if guidance is not None and guidance < 0:
        raise UserError(f"--guidance must be at least 0, not {guidance}")
    seconds = None if budget is None else parse_budget(budget, SMALLEST)
    return run(model, Wish(Path(out), seconds, steps, guidance, overwrite, seed, device), started, progress)
