r"""Constraints wrap a step or a denoiser: what is known of the data holds while the rest is made.

`Known` and `Again` are steps around a step (RePaint); `consistent` is a denoiser around a denoiser (posterior
gradients). For example `sample(consistent(denoise, ...), schedule, z, grid, Again(SAMPLERS["ddpm"], 3), noise)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .denoiser import trail
from .sampler import Denoise, Draw, State, Step, Stepped
from .schedule import Schedule

Linear = Callable[[Tensor], Tensor]


def strength_time(schedule: Schedule, strength: float) -> float:
    r"""The time at which noise has the share $\sigma / (\alpha + \sigma)$ = strength: 0 is the data, 1 all noise.

    Raises:
        UserError: The strength is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength must be between 0 and 1, not {strength}")
    if strength in (0, 1):
        return float(strength)
    return float(schedule.inverse(-2 * torch.logit(torch.tensor(strength, dtype=torch.float64))))


def _drawn(noise: Draw | None, like: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("a constraint that adds noise (Known, Again) needs `noise`")
    return noise().to(like)


@dataclass(frozen=True)
class Known:
    r"""A step after which the known positions hold $\alpha_s z + \sigma_s \epsilon$, whatever the step made of them.

    Args:
        step: The rule to wrap. It keeps no memory of steps before: those were not what it thinks.
        z: The data (B, ...).
        known: Where they are known, bool, broadcasts with z.

    References:
        Lugmayr et al., RePaint, https://arxiv.org/abs/2201.09865 (eq. 8).
    """

    step: Step
    z: Tensor
    known: Tensor

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped:
        z_s, _, z_hat = self.step(denoise, schedule, z, t, s, noise, None)
        alpha, sigma = (trail(c, z) for c in schedule(s))
        return torch.where(self.known, alpha * self.z + sigma * _drawn(noise, z), z_s), None, z_hat


@dataclass(frozen=True)
class Again:
    r"""A step taken several times, noise being put back in between, so that new and known parts fit each other.

    $z_t = (\alpha_t / \alpha_s) z_s + \sqrt{\sigma_t^2 - (\alpha_t \sigma_s / \alpha_s)^2} \, w$.

    Args:
        step: The rule to wrap.
        times: How often, at least 1.

    References:
        Lugmayr et al., RePaint, https://arxiv.org/abs/2201.09865 (algorithm 1).
    """

    step: Step
    times: int

    def __call__(
        self, denoise: Denoise, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, noise: Draw | None, state: State
    ) -> Stepped:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        keep = alpha_t / alpha_s
        fresh = (sigma_t**2 - (keep * sigma_s) ** 2).clamp_min(0).sqrt()
        stepped = self.step(denoise, schedule, z, t, s, noise, None)
        for _ in range(self.times - 1):
            z = trail(keep, z) * stepped[0] + trail(fresh, z) * _drawn(noise, z)
            stepped = self.step(denoise, schedule, z, t, s, noise, None)
        return stepped


def conjugate_gradients(operator: Linear, b: Tensor, rounds: int) -> Tensor:
    """Solve operator(x) = b for each item (B, ...), the operator being symmetric and positive.

    References:
        Hestenes and Stiefel, Methods of Conjugate Gradients, J. Res. NBS 49 (1952), section 3.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *(1,) * (b.ndim - 1))

    x, r, p = torch.zeros_like(b), b, b
    size = dot(r, r)
    for _ in range(rounds):
        q = operator(p)
        step = size / dot(p, q).clamp_min(1e-30)
        x, r = x + step * p, r - step * q
        size, before = dot(r, r), size
        p = r + size / before.clamp_min(1e-30) * p
    return x


def linearised(function: Linear, z: Tensor) -> tuple[Tensor, Linear, Linear]:
    r"""A function at z: its value D(z), and the maps $v \mapsto A v$ and $u \mapsto A^\top u$ of its Jacobian A there.

    $A^\top u$ is linear in u, so that its own gradient along v is $A v$: no forward mode, which not every layer has.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = function(z)
        u = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, z, u, create_graph=True)
    along: Linear = lambda v: torch.autograd.grad(pulled, u, v, retain_graph=True)[0]
    back: Linear = lambda u: torch.autograd.grad(value, z, u, retain_graph=True)[0]
    return value.detach(), along, back


def consistent(
    denoise: Denoise,
    schedule: Schedule,
    decode: Callable[[Tensor], Tensor],
    x: Tensor,
    known: Tensor,
    std: Tensor,
    rounds: int = 8,
) -> Denoise:
    r"""A denoiser that knows a part of the decoded item too: $E[z | z_t, x]$ for $x = D(z) + s \, n$ where known.

    With $\hat z$ and its variance $r^2 = \sigma^2 / (\alpha^2 + \sigma^2)$ it gives the minimum of
    $\| z - \hat z \|^2 / r^2 + \| D(z) - x \|^2 / s^2$ over the known part, D being linear around $\hat z$:
    $\hat z + \delta$ with $(s^2 + r^2 A^\top A) \delta = r^2 A^\top (x - D(\hat z))$. Exact for a linear D and data
    of unit variance; r^2 is an estimate otherwise.

    Args:
        denoise: (z, t) -> z_hat, with conditions and guidance bound.
        schedule: The path.
        decode: D, differentiable: latents (B, ...) to items.
        x: Items (B, ...), of which only the known part is looked at.
        known: Where they are known, bool, broadcasts with x.
        std: s (B,), how far D misses x at best.
        rounds: Conjugate-gradient rounds, each one pass forward and back through D.

    References:
        Song et al., Pseudoinverse-Guided Diffusion Models, https://openreview.net/forum?id=9_gsMA8MRKQ (eq. 7);
        He et al., Manifold Preserving Guided Diffusion, https://arxiv.org/abs/2311.16424 (no gradient of the denoiser);
        Zhu et al., DiffPIR, https://arxiv.org/abs/2305.08995 (eq. 10).
    """

    def part(z: Tensor) -> Tensor:
        return decode(z) * known

    def constrained(z: Tensor, t: Tensor) -> Tensor:
        z_hat = denoise(z, t)
        alpha, sigma = (trail(c, z) for c in schedule(t))
        r2, s2 = sigma**2 / (alpha**2 + sigma**2), trail(std**2, z)
        decoded, along, back = linearised(part, z_hat)
        miss = r2 * back(x * known - decoded)
        return z_hat + conjugate_gradients(lambda v: s2 * v + r2 * back(along(v)), miss, rounds)

    return constrained
