r"""Inpainting: wrappers of a step or a denoiser that fix the observed part of the data and sample the rest.

`Replace` and `Resample` wrap a step (RePaint); `reconstruction_guidance` wraps a denoiser, which then returns the
posterior mean given the observed data. Example:
`sample(reconstruction_guidance(denoise, ...), levels, z, Resample(SAMPLERS["ddpm"], 3), noise)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.core.denoiser import Denoise
from sfumato.core.sampler import NoiseFn, State, Step, StepResult
from sfumato.core.schedule import NoiseLevel, Schedule, append_dims_as
from sfumato.errors import UserError

TensorMap = Callable[[Tensor], Tensor]


def strength_time(schedule: Schedule, strength: float) -> float:
    r"""The time at which $\sigma / (\alpha + \sigma)$ equals the strength: 0 is the data, 1 pure noise.

    Raises:
        UserError: The strength is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength must be between 0 and 1, not {strength}")
    if strength in (0, 1):
        return float(strength)
    return float(schedule.inverse_logsnr(-2 * torch.logit(torch.tensor(strength, dtype=torch.float64))))


def _sample_noise(noise: NoiseFn | None, like: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("inpainting by Replace or Resample needs `noise`")
    return noise().to(like)


@dataclass(frozen=True)
class Replace:
    r"""A step that then overwrites the observed positions with $\alpha_s z + \sigma_s \epsilon$.

    Args:
        step: The step to wrap. Its multistep state is dropped: overwriting positions invalidates it.
        z: Clean latents (B, ...).
        observed: Mask of the observed positions, bool, broadcasts with z.

    References:
        Lugmayr et al., RePaint, https://arxiv.org/abs/2201.09865 (eq. 8).
    """

    step: Step
    z: Tensor
    observed: Tensor

    def __call__(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        z_s, _, z_hat = self.step(denoise, z, at_t, at_s, noise, None)
        return torch.where(self.observed, at_s.add_noise(self.z, _sample_noise(noise, z)), z_s), None, z_hat


@dataclass(frozen=True)
class Resample:
    r"""A step repeated several times, with noise added back in between, to harmonise generated and observed parts.

    $z_t = (\alpha_t / \alpha_s) z_s + \sqrt{\sigma_t^2 - (\alpha_t \sigma_s / \alpha_s)^2} \, w$.

    Args:
        step: The step to wrap.
        repeats: Number of times the step is taken, at least 1.

    References:
        Lugmayr et al., RePaint, https://arxiv.org/abs/2201.09865 (algorithm 1).
    """

    step: Step
    repeats: int

    def __call__(
        self, denoise: Denoise, z: Tensor, at_t: NoiseLevel, at_s: NoiseLevel, noise: NoiseFn | None, state: State
    ) -> StepResult:
        ratio = at_t.alpha / at_s.alpha
        std = (at_t.sigma**2 - (ratio * at_s.sigma) ** 2).clamp_min(0).sqrt()
        result = self.step(denoise, z, at_t, at_s, noise, None)
        for _ in range(self.repeats - 1):
            z = append_dims_as(ratio, z) * result[0] + append_dims_as(std, z) * _sample_noise(noise, z)
            result = self.step(denoise, z, at_t, at_s, noise, None)
        return result


def conjugate_gradients(operator: TensorMap, b: Tensor, iterations: int) -> Tensor:
    """Solve operator(x) = b for each item (B, ...), with a symmetric positive definite linear operator.

    References:
        Hestenes and Stiefel, Methods of Conjugate Gradients, J. Res. NBS 49 (1952), section 3.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *(1,) * (b.ndim - 1))

    x, r, p = torch.zeros_like(b), b, b
    rr = dot(r, r)
    for _ in range(iterations):
        q = operator(p)
        step = rr / dot(p, q).clamp_min(1e-30)
        x, r = x + step * p, r - step * q
        rr, previous = dot(r, r), rr
        p = r + rr / previous.clamp_min(1e-30) * p
    return x


def linearize(function: TensorMap, z: Tensor) -> tuple[Tensor, TensorMap, TensorMap]:
    r"""A function at z: its value D(z) and the products $v \mapsto A v$ and $u \mapsto A^\top u$ with its Jacobian A.

    $A^\top u$ is linear in u, so its gradient with respect to u gives $A v$: not every layer has forward mode.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = function(z)
        u = torch.zeros_like(value, requires_grad=True)
        (pullback,) = torch.autograd.grad(value, z, u, create_graph=True)
    jvp: TensorMap = lambda v: torch.autograd.grad(pullback, u, v, retain_graph=True)[0]
    vjp: TensorMap = lambda u: torch.autograd.grad(value, z, u, retain_graph=True)[0]
    return value.detach(), jvp, vjp


def reconstruction_guidance(
    denoise: Denoise,
    decode: Callable[[Tensor], Tensor],
    x: Tensor,
    observed: Tensor,
    std: Tensor,
    iterations: int = 8,
) -> Denoise:
    r"""A denoiser conditioned on part of the decoded item: $E[z | z_t, x]$ for observed $x = D(z) + s \, n$.

    With $\hat z$ and its variance $r^2 = \sigma^2 / (\alpha^2 + \sigma^2)$ it returns the minimum of
    $\| z - \hat z \|^2 / r^2 + \| D(z) - x \|^2 / s^2$ over the observed part, with D linearised at $\hat z$:
    $\hat z + \delta$ with $(s^2 + r^2 A^\top A) \delta = r^2 A^\top (x - D(\hat z))$. Exact for a linear D and data
    of unit variance; r^2 is an estimate otherwise.

    Args:
        denoise: (z, level) -> z_hat, with conditions and guidance bound.
        decode: D, differentiable: latents (B, ...) to items.
        x: Items (B, ...); only the observed part is used.
        observed: Mask of the observed part, bool, broadcasts with x.
        std: s (B,), the standard deviation of the codec's reconstruction error.
        iterations: Conjugate-gradient iterations, each one forward and one backward pass through D.

    References:
        Song et al., Pseudoinverse-Guided Diffusion Models, https://openreview.net/forum?id=9_gsMA8MRKQ (eq. 7);
        He et al., Manifold Preserving Guided Diffusion, https://arxiv.org/abs/2311.16424 (no gradient of the denoiser);
        Zhu et al., DiffPIR, https://arxiv.org/abs/2305.08995 (eq. 10).
    """

    def decode_observed(z: Tensor) -> Tensor:
        return decode(z) * observed

    def conditioned(z: Tensor, level: NoiseLevel) -> Tensor:
        z_hat = denoise(z, level)
        alpha, sigma = append_dims_as(level.alpha, z), append_dims_as(level.sigma, z)
        r2, s2 = sigma**2 / (alpha**2 + sigma**2), append_dims_as(std**2, z)
        decoded, jvp, vjp = linearize(decode_observed, z_hat)
        residual = r2 * vjp(x * observed - decoded)
        return z_hat + conjugate_gradients(lambda v: s2 * v + r2 * vjp(jvp(v)), residual, iterations)

    return conditioned
