"""Training: the plan, the loop, `fit`, which runs both stages, and `distill`, which makes few-step models."""

from sfumato.training.distill import distill
from sfumato.training.fit import fit

__all__ = ["distill", "fit"]
