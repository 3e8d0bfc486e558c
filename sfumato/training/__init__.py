"""Training: the plan, the loop, and `fit`, which runs both stages."""

from sfumato.training.fit import fit

__all__ = ["fit"]
