"""The weight average of an early moment, which autoguidance leads away from."""

from typing import Any

from torch import Tensor

from sfumato.training.ema import EMA


class Early:
    """Keeps the average when a share of the steps is done.

    Args:
        share: Of the steps.
    """

    def __init__(self, share: float) -> None:
        self.share, self.step = share, 0
        self.weights: dict[str, Tensor] = {}

    def after(self, step: int, steps: int, ema: EMA) -> None:
        """Keep the average after this step of so many, if it is time."""
        if not self.step and step >= self.share * steps:
            self.step, self.weights = step, ema.copy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a checkpoint: the average, and its step."""
        return {f"early/{k}": v for k, v in self.weights.items()}, {"early": self.step}

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a saved `state`."""
        self.step = int(facts["early"])
        self.weights = {k.removeprefix("early/"): v.clone() for k, v in tensors.items() if k.startswith("early/")}
