"""Training steps: modules whose `forward` is the loss. The trainer knows nothing of codecs or diffusion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sfumato.codecs import Codec
from sfumato.codecs.losses import AdversarialGate, adaptive_weight, frozen, hinge_d, hinge_g
from sfumato.core import Objective
from sfumato.model import ConditionalDenoiser
from sfumato.training.budget import StepBudget
from sfumato.types import Batch, Latent

GIVEN_SHARE = 0.1  # share of items for which training gives a segment, so that it can be given in sampling
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One optimizer's part of a training step.

    Args:
        name: Passed to the step's `forward`.
        parameters: Parameters that this phase trains.
        lr: Learning rate relative to that of the stage.
        betas: AdamW's betas.
        start: First training step of the phase.
    """

    name: str
    parameters: list[nn.Parameter]
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    start: int = 0


class TrainStep(nn.Module):
    """A module whose `forward(batch, phase, step, generator)` returns {"loss": scalar, and loss terms to report}."""

    @property
    def ema_module(self) -> nn.Module:
        """The part whose weights are averaged and saved."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        """The phases of each step, in order."""
        raise NotImplementedError

    @property
    def cost_breakpoints(self) -> list[int]:
        """Steps from which the cost of a step changes, starting with 0."""
        return [0]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        raise NotImplementedError


class CodecStep(TrainStep):
    r"""First stage: $L = L_{rec} + w_p L_{perc} + w_b L_{bottleneck} + w_a g(step) d L_{adv}$.

    The perceptual term starts late: what it adds is learned late, and steps without it take half as long. d balances
    the adversarial gradient against that of the other terms at the last layer; the gate g opens late, ramps up, and
    closes when the discriminator is always right.

    Args:
        codec: The codec.
        perceptual: (x̂, x) -> perceptual distance per item, or None.
        discriminator: Items -> logits, or None.
        reconstruction: Pixel loss, `l1` or `l2`.
        perceptual_weight: w_p.
        perceptual_start: First step of the perceptual term.
        bottleneck_weight: w_b; for `kl` per data value.
        adversarial_weight: w_a.
        adversarial_start: First step of the adversarial term.
        discriminator_lead: Number of steps before `adversarial_start` that the discriminator trains alone.
        step_budget: Number of steps of the stage; if it shrinks, the perceptual term starts earlier.

    References:
        Esser et al. 2021, Taming Transformers, eq. 6 and 7, https://arxiv.org/abs/2012.09841.
    """

    def __init__(
        self,
        codec: Codec,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        *,
        reconstruction: str = "l1",
        perceptual_weight: float = 0.5,
        perceptual_start: int = 0,
        bottleneck_weight: float = 1e-2,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 0,
        discriminator_lead: int = 100,
        step_budget: StepBudget | None = None,
    ) -> None:
        super().__init__()
        self.codec, self.step_budget = codec, step_budget
        self.perceptual = perceptual
        self.reconstruction, self.bottleneck_weight = reconstruction, bottleneck_weight
        self.perceptual_weight, self.perceptual_start = perceptual_weight, perceptual_start
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.discriminator, self.discriminator_start = discriminator, adversarial_start - discriminator_lead
        self.gate = (
            None if discriminator is None else AdversarialGate(adversarial_start, ramp=max(1, discriminator_lead))
        )
        self._x_hat: Tensor | None = None

    @property
    def ema_module(self) -> nn.Module:
        return self.codec

    def phases(self) -> list[Phase]:
        phases = [Phase("codec", list(self.codec.parameters()))]
        if self.discriminator is not None:
            parameters = list(self.discriminator.parameters())
            phases.append(Phase("discriminator", parameters, lr=0.25, betas=(0.5, 0.9), start=self.discriminator_start))
        return phases

    @property
    def cost_breakpoints(self) -> list[int]:
        perceptual = [] if self.perceptual is None else [self.perceptual_start]
        adversarial = [max(0, self.discriminator_start), self.adversarial_start]
        return sorted({0, *perceptual, *([] if self.discriminator is None else adversarial)})

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        if phase == "discriminator":
            return self._discriminator_loss(batch.data)
        return self._reconstruct(batch.data, batch.mask, step, generator)

    def _reconstruct(self, x: Tensor, mask: Tensor | None, step: int, generator: Generator) -> Losses:
        x_hat, bottleneck_loss, info = self.codec(x, generator, mask)
        self._x_hat = x_hat.detach()
        terms = {
            "rec": self.codec.reconstruction_loss(x_hat, x, self.reconstruction, mask).mean(),
            "bottleneck": bottleneck_loss.mean(),
        }
        loss = terms["rec"] + self.bottleneck_weight * terms["bottleneck"]
        if self.perceptual is not None and self._uses_perceptual(step):
            terms["perceptual"] = self.perceptual(x_hat, x).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None and step >= self.adversarial_start:
            loss = loss + self._adversarial_term(x_hat, loss, step, terms)
        return {"loss": loss, **terms, **{k: v for k, v in info.items() if v.ndim == 0}}

    def _uses_perceptual(self, step: int) -> bool:
        """Whether the perceptual term has started: earlier than planned if the number of steps has shrunk."""
        scale = 1.0 if self.step_budget is None else self.step_budget.min_steps(step) / self.step_budget.steps
        return step >= self.perceptual_start * scale

    def _adversarial_term(self, x_hat: Tensor, loss: Tensor, step: int, terms: Losses) -> Tensor:
        """The weighted adversarial term; its gradient reaches the codec but not the discriminator's weights."""
        assert self.discriminator is not None and self.gate is not None
        with frozen(self.discriminator):
            terms["adversarial"] = hinge_g(self.discriminator(x_hat)).mean()
        balance = adaptive_weight(loss, terms["adversarial"], x_hat, maximum=100.0)
        return self.adversarial_weight * self.gate(step) * balance * terms["adversarial"]

    def _discriminator_loss(self, x: Tensor) -> Losses:
        """The discriminator's loss on the same items and their reconstructions, which carry no gradient."""
        assert self.discriminator is not None and self.gate is not None and self._x_hat is not None
        real, fake = self.discriminator(x), self.discriminator(self._x_hat)
        self.gate.update(real, fake)
        return {"loss": hinge_d(real, fake).mean(), "accuracy": self.gate.accuracy.clone()}


def draw_given(shape: Sequence[int], generator: Generator) -> Tensor:
    """Draw which segments (B, S) are given, as some may be in sampling; never all of an item."""
    given = torch.rand(*shape, generator=generator) < GIVEN_SHARE
    return given & ~given.all(1, keepdim=True)


class DiffusionStep(TrainStep):
    """Second stage: denoise latents given their conditions.

    If a latent has segments, each has a time of its own. For a share of the items a segment is given, at time 0, which
    the density of times hardly reaches: there a network that has not seen it ignores what is given in sampling.

    Args:
        model: The denoiser and its conditioner.
        objective: Loss weight and time distribution.
        sample_latent: (x, generator, mask) -> sampled latents of data x, if batches hold data; None if they hold
            latents.
    """

    def __init__(
        self,
        model: ConditionalDenoiser,
        objective: Objective,
        sample_latent: Callable[[Tensor, Generator, Tensor | None], Latent] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.sample_latent = model, objective, sample_latent

    @property
    def ema_module(self) -> nn.Module:
        return self.model

    def phases(self) -> list[Phase]:
        return [Phase("denoiser", [*self.model.parameters(), *self.objective.parameters()])]

    def forward(self, batch: Batch, phase: str, step: int, generator: Generator) -> Losses:
        denoiser, count = self.model.denoiser, len(batch.data)
        latent = Latent(batch.data, batch.mask)
        if self.sample_latent is not None:
            latent = self.sample_latent(batch.data, generator, batch.mask)
        t = self.objective.sample_times(denoiser.schedule, denoiser.segments.shape(count), generator)
        t = t if t.ndim == 1 else t.masked_fill(draw_given(t.shape, generator), 0)
        eps = torch.randn(latent.z.shape, generator=generator).to(latent.z.device)
        cond = self.model.conditioner(batch.raw, count, generator)
        loss = self.objective.loss(denoiser, latent, cond, denoiser.schedule(t), eps)
        if t.ndim == 2:  # of a given segment there is nothing to learn
            t, loss = t[t > 0], loss[t > 0]
        if self.training:
            self.objective.update_with_losses(t, loss)
        return {"loss": loss.mean()}
