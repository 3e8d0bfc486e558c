"""Optimizers and the learning-rate schedule."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sfumato.config import StageSettings
from sfumato.training.budget import StepBudget
from sfumato.training.steps import Phase


def hidden_matrices(parameters: list[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Weight matrices of hidden layers, the parameters that Muon is for."""
    return (p for p in parameters if p.ndim == 2 and min(p.shape) >= 32)


def lr_scale(step: int, step_budget: StepBudget, warmup: int, decay: float) -> float:
    """Learning rate at a step relative to its peak: linear warm-up, constant, linear decay over the last `decay`."""
    return min((step + 1) / max(1, warmup + 1), step_budget.lr_factor(step, decay))


def make_optimizers(phase: Phase, settings: StageSettings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest."""
    muon = {id(p) for p in hidden_matrices(phase.parameters)} if settings.optimizer == "muon" else set[int]()
    hidden = [p for p in phase.parameters if id(p) in muon]
    rest = [p for p in phase.parameters if id(p) not in muon]
    decay = settings.weight_decay or 0.0
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, betas=phase.betas, weight_decay=decay, fused=True))
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory format of their parameters, which fused kernels require."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
