"""The base class of codecs: data to latents of zero mean and unit variance, and back."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.codecs.losses import reconstruction
from sfumato.types import CategoricalLayout, Latent


class Codec(nn.Module):
    """Encoder, bottleneck and decoder around a whitened latent space.

    Encoder and decoder use raw codes h; all other code sees z = (h − μ) / σ with μ, σ per channel, measured over the
    training set by `learn_statistics` and stored with the weights. So no scaling factor exists anywhere else.

    Args:
        latent_shape: Shape of one item's latent, channels first: (c, *spatial) for a grid, (d,) for a vector.
    """

    latent_mean: Tensor
    latent_std: Tensor
    encoder: nn.Module
    bottleneck: nn.Module
    decoder: nn.Module

    prepare_items = 0  # number of training items that `prepare` uses
    differentiable = True  # whether `decode_unquantized` has a useful gradient with respect to the latent
    stochastic = False  # whether one item has several latents, so that training samples a new one each time

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        per_channel = (latent_shape[0], *(1 for _ in latent_shape[1:]))
        self.register_buffer("latent_mean", torch.zeros(per_channel))
        self.register_buffer("latent_std", torch.ones(per_channel))

    @property
    def latent_size(self) -> int:
        """The number of elements of one item's latent."""
        return math.prod(self.latent_shape)

    @property
    def trainable(self) -> bool:
        """Whether there are weights to train."""
        return any(True for _ in self.parameters())

    def prepare(self, x: Tensor) -> None:
        """Fit whatever is computed from training items x (N, ...) before training; here nothing."""

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
        """The reconstruction loss (B,) of the decoder's output x_hat for data x."""
        return reconstruction(x_hat, x, kind)

    def sample_latent(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Sample a latent z (B, *latent_shape) of data x; here the deterministic one of `encode`."""
        return self.encode(x).z

    def encode(self, x: Tensor) -> Latent:
        """Latents z (B, *latent_shape) of data x; deterministic (the posterior mean, the nearest code)."""
        return Latent(self.whiten(self.encode_raw(x)))

    def encode_raw(self, x: Tensor) -> Tensor:
        """Raw codes h (B, *latent_shape) of data x, before whitening."""
        return self.bottleneck.mode(self.encoder(x)).float()  # type: ignore[operator]

    def whiten(self, h: Tensor) -> Tensor:
        """Whitened codes z = (h − μ) / σ of raw codes h."""
        return (h - self.latent_mean.to(h)) / self.latent_std.to(h)

    def decode(self, latent: Latent | Tensor) -> Tensor:
        """Decode latents z (B, *latent_shape); a discrete bottleneck first quantizes them to the nearest code."""
        z = latent.z if isinstance(latent, Latent) else latent
        h = self.bottleneck.quantize(z * self.latent_std + self.latent_mean)  # type: ignore[operator]
        return self.decoder(h).float()

    def decode_unquantized(self, z: Tensor) -> Tensor:
        """Decode latents z (B, *latent_shape) without quantizing them, so that the gradient is nonzero."""
        return self.decoder(z * self.latent_std + self.latent_mean).float()

    def categorical_layout(self) -> CategoricalLayout | None:
        """The positions of a latent that are one-hot codes of categories; here none."""
        return None

    def unmasked(self, mask: Tensor, present: bool = True) -> Tensor:
        """The positions of a latent that depend only on data outside a mask.

        Args:
            mask: (B, *axes of an item), true where the data may not be used.
            present: Whether values generated there must not be missing, for data with missing values.

        Returns:
            Bool, broadcasts with latents (B, *latent_shape). Here every position depends on the whole item.
        """
        return ~mask.flatten(1).any(1, keepdim=True).reshape(-1, *(1 for _ in self.latent_shape))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Training: the reconstruction of x, the bottleneck's loss per item (B,), and scalars to log."""
        h, loss, info = self.bottleneck(self.encoder(x), generator)
        return self.decoder(h), loss, info

    @torch.no_grad()
    def learn_statistics(self, h: Tensor | Iterable[Tensor], floor: float = 1e-3) -> None:
        """Set μ and σ per channel from the raw codes h (N, *latent_shape) of the training set, or from batches of them.

        A dead channel (σ below `floor` times the largest σ) gets that floor, so whitening does not amplify rounding.
        """
        mean, std = _mean_and_std([h] if isinstance(h, Tensor) else h)
        std = std.clamp(min=max(floor * float(std.max()), 1e-8))
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))


def _mean_and_std(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) per channel of codes (N, C, ...) in batches, in float64.

    References:
        Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance, eq. 2.1.
    """
    count, mean, sum_squares = 0, torch.zeros(()), torch.zeros(())
    for h in batches:
        var, batch_mean = (v.double() for v in torch.var_mean(h, (0, *range(2, h.ndim)), correction=0))
        n, delta = h.numel() // h.shape[1], batch_mean - mean
        total = count + n
        mean = mean + delta * (n / total)
        sum_squares = sum_squares + var * n + delta.square() * (count * n / total)
        count = total
    assert count, "statistics need at least one code"
    return mean, (sum_squares / count).sqrt()
