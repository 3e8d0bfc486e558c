"""Held-out items, looked at as training goes on: where their loss rises, items are learned by heart."""

from collections.abc import Sequence
from typing import Any

from sfumato.types import Batch

FIRST = 4  # times that the training items are gone through before the first look
RATIO = 1.15  # of the steps of one look to those of the one before
PATIENCE = 1.5  # steps gone without a smaller loss, as a multiple of those that the smallest one took
RISE, LAST = 1.002, 2  # how far above the smallest loss the mean of the last looks then has to be: it is noisy


class Watch:
    """Losses of held-out items under the weight average, at steps that form a geometric series.

    It says when the rate should begin to decay, and no more: while it does, and the average settles, samples get
    better though this loss may not (see the log).

    Args:
        batches: Held-out items.
        first: The step of the first look.
    """

    def __init__(self, batches: Sequence[Batch], first: int) -> None:
        self.batches, self.first = batches, first
        self.losses: list[tuple[int, float]] = []

    def due(self, step: int) -> bool:
        """Whether the average after this step is to be looked at."""
        return step >= (RATIO * self.losses[-1][0] if self.losses else self.first)

    def risen(self, step: int) -> bool:
        """Whether the smallest loss is of so long ago, and the last ones are so much larger, that it falls no more."""
        if not self.losses:
            return False
        first, smallest = min(self.losses, key=lambda look: look[1])
        last = [loss for _, loss in self.losses[-LAST:]]
        return step >= PATIENCE * first and sum(last) > RISE * smallest * len(last)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON can hold it."""
        return {"held_out": self.losses}

    def load(self, facts: dict[str, Any]) -> None:
        """Go on from a saved `state`."""
        self.losses = [(int(step), float(loss)) for step, loss in facts["held_out"]]
