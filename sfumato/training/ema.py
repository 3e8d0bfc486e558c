"""Averages of the weights over training."""

import torch
from torch import Tensor, nn

EVERY = 4  # steps between two looks at the weights
DENSE = 100  # steps, a multiple of it, after each of which they are looked at


def ema_exponent(width: float) -> float:
    r"""γ of the power-function average whose standard deviation is `width` of the training so far.

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

    β_k = 0, so the average is right from the first step on, and its width grows with training; the same setting serves
    a hundred steps and a million. In the beginning k = 1, later the weights are looked at every few steps: they hardly
    differ, and going through all of them takes time.

    Args:
        module: What is averaged: floating-point parameters; other state is copied.
        width: σ_rel, the average's standard deviation relative to the training's length; 0 keeps the last weights.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        self.exponent = ema_exponent(width) if width > 0 else float("inf")
        self.source = dict(module.named_parameters())
        self.weights = {name: value.detach().clone() for name, value in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        k = 1 if step <= DENSE or self.exponent == float("inf") else EVERY
        if step % k:
            return
        beta = 0.0 if step <= 1 or self.exponent == float("inf") else (1 - k / step) ** (self.exponent + 1)
        torch._foreach_lerp_(list(self.weights.values()), [v.detach() for v in self.source.values()], 1 - beta)

    def copy(self) -> dict[str, Tensor]:
        """The average as it is now."""
        return {name: value.clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from saved weights."""
        for name, value in self.weights.items():
            value.copy_(state[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averaged parameters into the module."""
        for name, value in self.source.items():
            value.copy_(self.weights[name])
