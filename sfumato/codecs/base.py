"""What every codec promises: data in, latents of zero mean and unit variance out, and back."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.codecs.losses import reconstruction
from sfumato.types import Corners, Latent


class Codec(nn.Module):
    """Encoder, bottleneck and decoder around a whitened latent space.

    The networks work on raw codes h; everything outside sees z = (h − μ) / σ with μ, σ per channel, measured over
    the training set by `learn_statistics` and stored with the weights. So no scaling factor exists anywhere else.

    Args:
        latent_shape: Shape of one item's latent, channels first: (c, *spatial) for a grid, (d,) for a vector.
    """

    latent_mean: Tensor
    latent_std: Tensor
    encoder: nn.Module
    bottleneck: nn.Module
    decoder: nn.Module

    prepares = 0  # training items that `prepare` looks at
    graded = True  # whether `draft` has a gradient that says which way data change with a latent
    draws = False  # whether several latents stand for one item, so that training draws a new one each time

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        per_channel = (latent_shape[0], *(1 for _ in latent_shape[1:]))
        self.register_buffer("latent_mean", torch.zeros(per_channel))
        self.register_buffer("latent_std", torch.ones(per_channel))

    @property
    def latent_size(self) -> int:
        """How many numbers one item's latent holds."""
        return math.prod(self.latent_shape)

    @property
    def learns(self) -> bool:
        """Whether there are weights to train."""
        return any(True for _ in self.parameters())

    def prepare(self, x: Tensor) -> None:
        """Take from training items x (N, ...) what can be known before training; here nothing."""

    def distance(self, x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
        """How far what the decoder puts out is from data x: a number per item (B,), to be trained on."""
        return reconstruction(x_hat, x, kind)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One of the latents z (B, *latent_shape) that stand for data x."""
        return self.encode(x).z

    def encode(self, x: Tensor) -> Latent:
        """Latents z (B, *latent_shape) of data x; deterministic (the posterior's mean, the nearest code)."""
        return Latent(self.whitened(self.codes(x)))

    def codes(self, x: Tensor) -> Tensor:
        """Raw codes h (B, *latent_shape) of data x, not whitened."""
        return self.bottleneck.mode(self.encoder(x)).float()  # type: ignore[operator]

    def whitened(self, h: Tensor) -> Tensor:
        """Whitened codes z = (h − μ) / σ of raw codes h."""
        return (h - self.latent_mean.to(h)) / self.latent_std.to(h)

    def decode(self, latent: Latent | Tensor) -> Tensor:
        """Data of latents z (B, *latent_shape); discrete bottlenecks first snap to their nearest code."""
        z = latent.z if isinstance(latent, Latent) else latent
        h = self.bottleneck.snap(z * self.latent_std + self.latent_mean)  # type: ignore[operator]
        return self.decoder(h).float()

    def draft(self, z: Tensor) -> Tensor:
        """Data of latents z (B, *latent_shape) that are not snapped to a code: has a gradient everywhere."""
        return self.decoder(z * self.latent_std + self.latent_mean).float()

    def corners(self) -> Corners | None:
        """Which positions of a latent are levels of categories; here none."""
        return None

    def untouched(self, mask: Tensor, present: bool = True) -> Tensor:
        """The positions of a latent that stand for data outside a mask alone.

        Args:
            mask: (B, *axes of an item), true where the data may not be used.
            present: Whether what is made there has to be something, where data can be missing.

        Returns:
            Bool, broadcasts with latents (B, *latent_shape). Here each position stands for the whole item.
        """
        return ~mask.flatten(1).any(1, keepdim=True).reshape(-1, *(1 for _ in self.latent_shape))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The training path: reconstruction of x, the bottleneck's loss per item (B,), and what it has to tell."""
        h, loss, info = self.bottleneck(self.encoder(x), generator)
        return self.decoder(h), loss, info

    @torch.no_grad()
    def learn_statistics(self, h: Tensor | Iterable[Tensor], floor: float = 1e-3) -> None:
        """Set μ and σ per channel from the raw codes h (N, *latent_shape) of the training set, or from pieces of them.

        A dead channel (σ below `floor` of the largest) keeps that floor, so that whitening never amplifies rounding.
        """
        mean, std = _mean_and_deviation([h] if isinstance(h, Tensor) else h)
        std = std.clamp(min=max(floor * float(std.max()), 1e-8))
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))


def _mean_and_deviation(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) per channel of codes (N, C, ...) that come in pieces, in float64.

    References:
        Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance, eq. 2.1.
    """
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for h in parts:
        var, middle = (v.double() for v in torch.var_mean(h, (0, *range(2, h.ndim)), correction=0))
        here, away = h.numel() // h.shape[1], middle - mean
        total = count + here
        mean = mean + away * (here / total)
        square = square + var * here + away.square() * (count * here / total)
        count = total
    assert count, "statistics of nothing"
    return mean, (square / count).sqrt()
