"""Exponential moving averages of the weights over training, with a power-function profile."""

import torch
from torch import Tensor, nn

UPDATE_EVERY = 4  # steps between updates; the weights hardly differ from one step to the next
UPDATE_ALWAYS_UNTIL = 100  # steps with an update after each one; a multiple of `UPDATE_EVERY`


def ema_exponent(width: float) -> float:
    r"""Exponent γ of the power-function average of relative standard deviation `width`.

    $\sigma_{rel} = \sqrt{(γ+1) / ((γ+2)^2 (γ+3))}$ has one positive solution, a root of
    $γ^3 + 7γ^2 + (16 − σ^{−2})γ + (12 − σ^{−2})$.

    References:
        Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, eq. 125 and 126.
    """
    t = width**-2
    low, high = 0.0, t
    for _ in range(100):
        middle = (low + high) / 2
        if middle**3 + 7 * middle**2 + (16 - t) * middle + (12 - t) < 0:
            low = middle
        else:
            high = middle
    return low


class EMA:
    r"""Power-function average $\hat\theta_n = β_n \hat\theta_{n−k} + (1 − β_n) θ_n$ with $β_n = (1 − k/n)^{γ+1}$.

    β_k = 0, so the average is valid from the first step on, and its width grows with training: the same setting suits a
    hundred steps and a million. The update interval k is 1 at first and `UPDATE_EVERY` later, to save time.

    Args:
        module: Module whose parameters are averaged.
        width: σ_rel, standard deviation of the average relative to the length of training; 0 keeps the last weights.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        self.exponent = ema_exponent(width) if width > 0 else float("inf")
        self.source = dict(module.named_parameters())
        self.weights = {name: value.detach().clone() for name, value in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after step `step`, counted from 1."""
        k = 1 if step <= UPDATE_ALWAYS_UNTIL or self.exponent == float("inf") else UPDATE_EVERY
        if step % k:
            return
        beta = 0.0 if step <= 1 or self.exponent == float("inf") else (1 - k / step) ** (self.exponent + 1)
        torch._foreach_lerp_(list(self.weights.values()), [v.detach() for v in self.source.values()], 1 - beta)

    def copy(self) -> dict[str, Tensor]:
        """A copy of the current average."""
        return {name: value.clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore saved averages."""
        for name, value in self.weights.items():
            value.copy_(state[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the averages into the module."""
        for name, value in self.source.items():
            value.copy_(self.weights[name])
