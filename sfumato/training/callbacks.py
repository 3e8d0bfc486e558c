"""Training callbacks: early stopping and the snapshot of the guide."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sfumato.training.ema import EMA
from sfumato.types import Batch

FIRST_CHECK_EPOCH = 4  # epochs before the first check of the held-out loss
CHECK_INTERVAL_RATIO = 1.15  # step of a check relative to the step of the previous one
PATIENCE_RATIO = 1.5  # steps without a new minimum, relative to the step of the minimum
SMOOTHED_CHECKS = 2  # latest checks whose mean is compared with the minimum: single losses are noisy
MIN_RISE = 1.002  # that mean relative to the minimum, from which the loss counts as rising


class GuideSnapshot:
    """Keeps the averaged weights after a share of the steps, as the guide of autoguidance.

    Args:
        share: Share of the steps.
    """

    def __init__(self, share: float) -> None:
        self.share, self.step = share, 0
        self.weights: dict[str, Tensor] = {}

    def after_step(self, step: int, steps: int, ema: EMA) -> None:
        """Copy the average once step `step` of `steps` reaches the share."""
        if not self.step and step >= self.share * steps:
            self.step, self.weights = step, ema.copy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata for a checkpoint."""
        return {f"guide/{k}": v for k, v in self.weights.items()}, {"guide_step": self.step}

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Restore a saved `state`."""
        self.step = int(metadata["guide_step"])
        self.weights = {k.removeprefix("guide/"): v.clone() for k, v in tensors.items() if k.startswith("guide/")}


class EarlyStopping:
    """Early stopping on the held-out loss under the weight average, checked at steps that form a geometric series.

    It starts the learning-rate decay early and does not end training at once: during the decay, while the average
    settles, samples still improve although this loss may not (measured; see docs/LOG.md).

    Args:
        batches: Held-out items.
        first_check: Step of the first check.
    """

    def __init__(self, batches: Sequence[Batch], first_check: int) -> None:
        self.batches, self.first_check = batches, first_check
        self.losses: list[tuple[int, float]] = []

    def due(self, step: int) -> bool:
        """Whether to check the held-out loss after this step."""
        return step >= (CHECK_INTERVAL_RATIO * self.losses[-1][0] if self.losses else self.first_check)

    def should_stop(self, step: int) -> bool:
        """Whether the minimum is older than the patience and the latest losses are clearly above it."""
        if not self.losses:
            return False
        best_step, minimum = min(self.losses, key=lambda check: check[1])
        latest = [loss for _, loss in self.losses[-SMOOTHED_CHECKS:]]
        return step >= PATIENCE_RATIO * best_step and sum(latest) > MIN_RISE * minimum * len(latest)

    def state(self) -> dict[str, Any]:
        """Metadata for a checkpoint."""
        return {"held_out": self.losses}

    def load(self, metadata: dict[str, Any]) -> None:
        """Restore a saved `state`."""
        self.losses = [(int(step), float(loss)) for step, loss in metadata["held_out"]]
