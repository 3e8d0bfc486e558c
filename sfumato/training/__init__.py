"""Training: `fit` trains both stages of a model, `distill` turns it into a few-step model."""

from sfumato.training.distill import distill
from sfumato.training.fit import fit

__all__ = ["distill", "fit"]
