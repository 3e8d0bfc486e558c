"""Codec losses: reconstruction, the hinge losses of a discriminator, and the weight of the adversarial loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError

RECONSTRUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda x_hat, x: (x_hat - x).abs(),
    "l2": lambda x_hat, x: (x_hat - x).square(),
}


def reconstruction(x_hat: Tensor, x: Tensor, kind: str = "l1") -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error of each item, in float32: x_hat and x (B, ...) -> (B,)."""
    if kind not in RECONSTRUCTIONS:
        raise UserError(f"unknown reconstruction loss {kind!r}: choose one of {', '.join(RECONSTRUCTIONS)}")
    return RECONSTRUCTIONS[kind](x_hat.float(), x.float()).flatten(1).mean(1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a module inside the block: gradients flow through it, but none are computed for its parameters."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    r"""The discriminator's loss $\tfrac12 E[(1 - D(x))_+] + \tfrac12 E[(1 + D(\hat x))_+]$ of each item.

    Args:
        real: Logits of data, (B, 1, h, w).
        fake: Logits of detached reconstructions, same shape.

    References:
        Lim & Ye 2017, https://arxiv.org/abs/1705.02894
    """
    return (F.relu(1 - real.float()) + F.relu(1 + fake.float())).flatten(1).mean(1) / 2


def hinge_g(fake: Tensor) -> Tensor:
    """The codec's adversarial loss, -D(x_hat), of each item: logits (B, 1, h, w) -> (B,)."""
    return -fake.float().flatten(1).mean(1)


def adaptive_weight(rec_loss: Tensor, adv_loss: Tensor, last_layer: Tensor, maximum: float = 100.0) -> Tensor:
    r"""Weight that equalises the norms of both gradients, $\lVert g_r \rVert/\lVert g_a \rVert$.

    Args:
        rec_loss: Reconstruction loss, a scalar, including perceptual terms.
        adv_loss: Adversarial loss, a scalar.
        last_layer: The tensor whose gradients are compared: the weight of the decoder's last layer, or x_hat, which is
            cheaper because it needs no backward pass through the decoder.
        maximum: Largest weight.

    Returns:
        Scalar without gradient; zero if a gradient is not finite. No `.grad` changes.

    References:
        Esser et al. 2021, https://arxiv.org/abs/2012.09841, eq. 7
    """
    rec, adv = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (rec_loss, adv_loss))
    weight = (rec.norm() / adv.norm().clamp(min=1e-12)).clamp(max=maximum)
    return torch.where(torch.isfinite(weight), weight, 0.0).detach()


class AdversarialGate(nn.Module):
    """Factor on the adversarial loss: 0 before `start`, then a ramp, reduced while the discriminator is too good.

    A discriminator that is nearly always right uses differences that the codec cannot fix yet, and its gradient only
    does harm. So the ramp is multiplied by a linear function of the moving average of its accuracy: 1 up to
    `open_accuracy`, `floor` from `closed_accuracy` on. The average is a buffer and the step an argument, so a resumed
    run continues exactly.

    Args:
        start: First step with any adversarial loss; train the discriminator, and call `update`, before it.
        ramp: Number of steps from 0 to 1.
        open_accuracy: Accuracy up to which the factor is not reduced.
        closed_accuracy: Accuracy from which the factor is `floor`.
        floor: Smallest factor; above 0 if the codec should catch up through the adversarial loss itself.
        decay: Decay of the moving average per update.
    """

    accuracy: Tensor

    def __init__(
        self,
        start: int,
        ramp: int = 1,
        open_accuracy: float = 0.9,
        closed_accuracy: float = 0.97,
        floor: float = 0.0,
        decay: float = 0.98,
    ) -> None:
        super().__init__()
        assert open_accuracy < closed_accuracy, "open_accuracy must be below closed_accuracy"
        self.start, self.ramp, self.floor, self.decay = start, max(ramp, 1), floor, decay
        self.open_accuracy, self.closed_accuracy = open_accuracy, closed_accuracy
        self.register_buffer("accuracy", torch.tensor(0.5))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Update the accuracy (fraction of patches classified correctly) with the logits of a discriminator step."""
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        self.accuracy.lerp_(accuracy, 1 - self.decay)

    def forward(self, step: int) -> Tensor:
        """The factor at this optimizer step, a scalar in 0..1."""
        ramp = min(max((step - self.start) / self.ramp, 0.0), 1.0)
        gate = ((self.closed_accuracy - self.accuracy) / (self.closed_accuracy - self.open_accuracy)).clamp(0, 1)
        return ramp * (self.floor + (1 - self.floor) * gate)
