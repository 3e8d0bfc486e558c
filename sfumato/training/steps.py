"""What is trained: a step is a module whose `forward` is the loss. The loop knows nothing of codecs or diffusion."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sfumato.codecs import Codec
from sfumato.codecs.losses import (
    AdversarialGate,
    PatchDiscriminator,
    adaptive_weight,
    hinge_d,
    hinge_g,
)
from sfumato.conditioners import Conditioner
from sfumato.core import Denoiser, Objective
from sfumato.core.objective import masked_mean, squared
from sfumato.training.horizon import Horizon
from sfumato.types import Batch

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One optimizer's turn within a step.

    Args:
        name: Handed to the step's `forward`.
        parameters: What this phase trains.
        lr: Learning rate relative to the stage's.
        betas: Of AdamW.
        start: First optimizer step at which the phase runs.
    """

    name: str
    parameters: list[nn.Parameter]
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    start: int = 0


class TrainStep(nn.Module):
    """A module whose `forward(batch, phase, step, generator)` gives {"loss": scalar, …terms to show}.

    `averaged` is the part that the weight average follows and that is kept.
    """

    @property
    def averaged(self) -> nn.Module:
        """The part that is kept."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        """The optimizers that take turns in each step."""
        raise NotImplementedError

    @property
    def turns(self) -> list[int]:
        """Steps at which a step becomes more, or less, work than before; 0 is one."""
        return [0]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        raise NotImplementedError


class CodecStep(TrainStep):
    r"""First stage: $L = L_{rec} + w_p L_{perc} + w_b L_{bottleneck} + w_a g(step) d L_{adv}$.

    The perceptual term plays from its start on: what it adds is learned late, and steps without it take half as long.
    d balances the adversarial gradient against the others at the last layer; the gate g starts late, ramps up, and
    closes when the discriminator is always right.

    Args:
        codec: The codec.
        perceptual: (x̂, x) -> distance per item, or None.
        kind: `l1` or `l2` for the pixels.
        perceptual_weight: w_p.
        perceptual_start: Step at which the perceptual term begins.
        bottleneck_weight: w_b: per data value for `kl`.
        adversarial_weight: w_a; 0 builds no discriminator.
        start: Step at which the adversarial loss begins; the discriminator begins `lead` steps before.
        lead: Steps the discriminator trains alone.
        channels: Channels of the data.

    References:
        Esser et al. 2021, Taming Transformers, eq. 6 and 7.
    """

    def __init__(
        self,
        codec: Codec,
        perceptual: nn.Module | None,
        *,
        kind: str = "l1",
        perceptual_weight: float = 0.5,
        perceptual_start: int = 0,
        bottleneck_weight: float = 1e-2,
        adversarial_weight: float = 0.0,
        start: int = 0,
        lead: int = 100,
        channels: int = 3,
        horizon: Horizon | None = None,
    ) -> None:
        super().__init__()
        self.codec, self.horizon = codec, horizon
        self.perceptual = perceptual
        self.kind, self.perceptual_weight, self.bottleneck_weight = kind, perceptual_weight, bottleneck_weight
        self.perceptual_start = perceptual_start
        self.adversarial_weight, self.start, self.lead = adversarial_weight, start, lead
        self.discriminator = PatchDiscriminator(channels) if adversarial_weight else None
        self.gate = AdversarialGate(start, ramp=max(1, lead)) if adversarial_weight else None
        self._drawn: Tensor | None = None

    @property
    def averaged(self) -> nn.Module:
        return self.codec

    def phases(self) -> list[Phase]:
        phases = [Phase("codec", list(self.codec.parameters()))]
        if self.discriminator is not None:
            judge = list(self.discriminator.parameters())
            phases.append(Phase("discriminator", judge, lr=0.25, betas=(0.5, 0.9), start=self.start - self.lead))
        return phases

    @property
    def turns(self) -> list[int]:
        late = [] if self.perceptual is None else [self.perceptual_start]
        return sorted({0, *late, *([] if self.discriminator is None else [max(0, self.start - self.lead), self.start])})

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        if phase == "discriminator":
            return self._judge(batch.data)
        return self._reconstruct(batch.data, step, generator)

    def _reconstruct(self, x: Tensor, step: int, generator: Generator) -> Losses:
        x_hat, extra, info = self.codec(x, generator)
        self._drawn = x_hat.detach()
        terms = {"rec": self.codec.distance(x_hat, x, self.kind).mean(), "bottleneck": extra.mean()}
        loss = terms["rec"] + self.bottleneck_weight * terms["bottleneck"]
        if self.perceptual is not None and self._late(step):
            terms["perceptual"] = self.perceptual(x_hat, x).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None and step >= self.start:
            loss = loss + self._fool(x_hat, loss, step, terms)
        return {"loss": loss, **terms, **{k: v for k, v in info.items() if v.ndim == 0}}

    def _late(self, step: int) -> bool:
        """Whether the perceptual term plays: earlier than planned where there turn out to be fewer steps."""
        share = 1.0 if self.horizon is None else self.horizon.fewest(step) / self.horizon.steps
        return step >= self.perceptual_start * share

    def _fool(self, x_hat: Tensor, loss: Tensor, step: int, terms: Losses) -> Tensor:
        """The adversarial term: gradients reach the codec and leave the discriminator's weights alone."""
        assert self.discriminator is not None and self.gate is not None
        self.discriminator.requires_grad_(False)
        terms["adversarial"] = hinge_g(self.discriminator(x_hat)).mean()
        self.discriminator.requires_grad_(True)
        balance = adaptive_weight(loss, terms["adversarial"], x_hat, maximum=100.0)
        return self.adversarial_weight * self.gate(step) * balance * terms["adversarial"]

    def _judge(self, x: Tensor) -> Losses:
        """The discriminator's turn, on the same images and their reconstructions, which carry no gradient."""
        assert self.discriminator is not None and self.gate is not None and self._drawn is not None
        real, fake = self.discriminator(x), self.discriminator(self._drawn)
        self.gate.update(real, fake)
        return {"loss": hinge_d(real, fake).mean(), "accuracy": self.gate.accuracy.clone()}


class DiffusionStep(TrainStep):
    """Second stage: denoise latents under their conditions.

    Args:
        denoiser: Network, schedule and parametrisation.
        conditioner: Labels -> what the network is told.
        objective: Weight and time density.
        draw: (x, generator) -> latents of data x, where batches hold data; None where they hold latents.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        objective: Objective,
        draw: Callable[[Tensor, Generator], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.conditioner, self.objective, self.draw = denoiser, conditioner, objective, draw

    @property
    def averaged(self) -> nn.Module:
        return nn.ModuleDict({"denoiser": self.denoiser, "conditioner": self.conditioner})

    def phases(self) -> list[Phase]:
        return [Phase("denoiser", [*self.averaged.parameters(), *self.objective.parameters()])]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        z = batch.data if self.draw is None else self.draw(batch.data, generator)
        t = self.objective.draw(self.denoiser.schedule, (len(z),), generator)
        eps = torch.randn(z.shape, generator=generator).to(z.device)
        label = None if batch.label is None else self.conditioner.drop(batch.label, generator)
        cond = self.conditioner(label, len(z))
        loss = self.objective.loss(self.denoiser, z, cond, None, t, eps)
        if self.training:
            self.objective.observe(t, loss)
        return {"loss": loss.mean()}


@dataclass(kw_only=True)
class Jumps(Batch):
    """States z (B, ...) of trajectories at times t (B,); as `target` (B, ...) their ends (s = 0) or z_hat (s = t)."""

    t: Tensor
    s: Tensor
    target: Tensor


class JumpStep(TrainStep):
    r"""Teach a denoiser where trajectories end: $\sqrt{\| \hat z(z_t, t, s) - target \|^2 / d + c^2}$, d numbers each.

    Where an end is a toss-up, as between two classes, a squared error would pull hardest, and towards the middle.

    Args:
        denoiser: One that jumps.
        conditioner: Labels -> what the network is told.

    References:
        Song and Dhariwal, https://arxiv.org/abs/2310.14189 (section 3.3, the pseudo-Huber loss of consistency models).
    """

    C = 0.03

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    @property
    def averaged(self) -> nn.Module:
        return nn.ModuleDict({"denoiser": self.denoiser, "conditioner": self.conditioner})

    def phases(self) -> list[Phase]:
        return [Phase("jump", list(self.averaged.parameters()))]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        assert isinstance(batch, Jumps)
        cond = self.conditioner(batch.label, len(batch.data))
        z_hat = self.denoiser(batch.data, batch.t, cond, s=batch.s)
        return {"loss": (masked_mean(squared(z_hat, batch.target)) + self.C**2).sqrt().mean()}


def matrices(parameters: list[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Those that are matrices between hidden layers, which Muon is made for."""
    return (p for p in parameters if p.ndim == 2 and min(p.shape) >= 32)
