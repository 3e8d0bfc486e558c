"""Guidance: wrappers of `denoise(z, level) -> z_hat`. One formula, lerp(reference, conditional, w); w = 1 is off.

For example `cfg(conditional, null, interval(2.0, 0.1, 0.8), rescale(0.7))`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.core.denoiser import BoundDenoiser, Denoise
from sfumato.core.schedule import NoiseLevel, append_dims

GuidanceWeight = Callable[[Tensor], Tensor]
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def lerp(reference: Tensor, conditional: Tensor, w: Tensor) -> Tensor:
    """Return reference + w (conditional - reference), with w over the leading axes."""
    return torch.lerp(reference, conditional, append_dims(w.to(conditional), conditional))


def rescale(phi: float, combine: Combine = lerp) -> Combine:
    r"""Rescale the guided z_hat toward the standard deviation of the conditional one; phi = 1 restores it fully.

    References:
        Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed, https://arxiv.org/abs/2305.08891
        (eq. 14 to 16).
    """

    def rescaled(reference: Tensor, conditional: Tensor, w: Tensor) -> Tensor:
        guided = combine(reference, conditional, w)
        axes = tuple(range(1, guided.ndim))
        gain = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-8)
        return guided * (1 - phi + phi * gain)

    return rescaled


def interval(w: float, lo: float = 0.0, hi: float = 1.0) -> GuidanceWeight:
    """The weight w at times lo <= t <= hi, and 1 (off) outside.

    References:
        Kynkäänniemi et al., Applying Guidance in a Limited Interval, https://arxiv.org/abs/2404.07724.
    """
    return lambda t: torch.where((t >= lo) & (t <= hi), w, 1.0)


def cfg(
    conditional: Denoise, reference: Denoise, w: float | Tensor | GuidanceWeight, combine: Combine = lerp
) -> Denoise:
    """Classifier-free guidance: extrapolate a denoiser away from a reference, such as the null condition.

    Args:
        conditional: The denoiser to guide.
        reference: The denoiser to move away from; not called where every weight is 1.
        w: Guidance weight: a number, a tensor (B,), or a function of t such as `interval`.
        combine: (reference, conditional, w) -> z_hat; `lerp`, or `rescale(phi)`.

    References:
        Ho and Salimans, Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598.
    """

    def guided(z: Tensor, level: NoiseLevel) -> Tensor:
        weight = w(level.t) if callable(w) else torch.as_tensor(w)
        z_hat = conditional(z, level)
        return z_hat if bool((weight == 1).all()) else combine(reference(z, level), z_hat, weight)

    return guided


def autoguidance(strong: BoundDenoiser, weak: BoundDenoiser, w: float) -> Denoise:
    """Autoguidance: extrapolate a denoiser away from a weaker one that predicts the same; w = 1 is off.

    The network outputs F are extrapolated, not z_hat, so that for categories the guided F still gives probabilities.

    References:
        Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, https://arxiv.org/abs/2406.02507.
    """
    if w == 1:
        return strong

    def guided(z: Tensor, level: NoiseLevel) -> Tensor:
        f = torch.lerp(weak.network_output(z, level), strong.network_output(z, level), w)
        return strong.denoiser.prediction.expectation(f, z, level)

    return guided
