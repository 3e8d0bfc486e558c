"""The base class of codecs: data to latents of zero mean and unit variance, and back."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.codecs.losses import reconstruction
from sfumato.types import CategoricalLayout, Latent

OBSERVED_LENGTHS = 1024  # training items whose lengths are kept, to draw those of new items


class Codec(nn.Module):
    """Encoder, bottleneck and decoder around a whitened latent space.

    Encoder and decoder use raw codes h; all other code sees z = (h − μ) / σ with μ, σ per channel, measured over the
    training set by `learn_statistics` and stored with the weights. So no scaling factor exists anywhere else.

    Items of several lengths are padded along their first axis, x (B, L, ...) with a mask (B, L); their latents are
    tokens (B, N, D) with a mask (B, N).

    Args:
        latent_shape: Shape of one item's latent: (D,) for a vector, (C, *grid) for a grid, (N, D) for up to N tokens.
    """

    latent_mean: Tensor
    latent_std: Tensor
    lengths: Tensor
    encoder: nn.Module
    bottleneck: nn.Module
    decoder: nn.Module

    tokens = False  # whether a latent is tokens (N, D)
    segments: tuple[int, ...] = ()  # positions of each segment that has a time of its own; empty for one time
    prepare_items = 0  # number of training items that `prepare` uses
    differentiable = True  # whether `decode_unquantized` has a useful gradient with respect to the latent
    stochastic = False  # whether one item has several latents, so that training samples a new one each time

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        per_channel = latent_shape[1:] if self.tokens else (latent_shape[0], *(1 for _ in latent_shape[1:]))
        self.register_buffer("latent_mean", torch.zeros(per_channel))
        self.register_buffer("latent_std", torch.ones(per_channel))
        if self.tokens:
            capacity = torch.tensor(self.segments or latent_shape[:1])  # positions of each segment (S,)
            self.register_buffer("lengths", capacity.repeat(OBSERVED_LENGTHS, 1))

    @property
    def latent_size(self) -> int:
        """The number of elements of one item's latent."""
        return math.prod(self.latent_shape)

    @property
    def positions(self) -> int:
        """The number of positions of one item's latent: of a vector one."""
        return self.latent_shape[0] if self.tokens else math.prod(self.latent_shape[1:])

    @property
    def trainable(self) -> bool:
        """Whether there are weights to train."""
        return any(True for _ in self.parameters())

    def prepare(self, x: Tensor) -> None:
        """Fit whatever is computed from training items x (N, ...) before training; here nothing."""

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
        """The reconstruction loss (B,) of the decoder's output x_hat for data x, where the mask (B, L) is true."""
        if mask is not None:
            x_hat = torch.where(mask.reshape(*mask.shape, *(1 for _ in x.shape[2:])), x_hat, x)
        loss = reconstruction(x_hat, x, kind)
        return loss if mask is None else loss * mask.shape[1] / mask.sum(1).clamp_min(1)

    def sample_latent(self, x: Tensor, generator: torch.Generator, mask: Tensor | None = None) -> Latent:
        """Sample the latents of data x; here the deterministic ones of `encode`."""
        return self.encode(x, mask)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Latent:
        """Latents of data x; deterministic (the posterior mean, the nearest code).

        Args:
            x: Data (B, ...), or (B, L, ...) if padded.
            mask: (B, L), true where a padded item has data.
        """
        return self.whiten(self.encode_raw(x, mask), self.latent_mask(mask))

    def encode_raw(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raw codes h (B, *latent_shape) of data x, before whitening; of tokens as many as the longest item has."""
        return self.bottleneck.mode(self.encoder(x)).float()  # type: ignore[operator]

    def latent_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask (B, N) of the tokens of padded data with the mask (B, L); here a token per element."""
        return mask

    def data_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask (B, L) of the data that tokens with the mask (B, N) decode to; here an element per token."""
        return mask

    def whiten(self, h: Tensor, mask: Tensor | None = None) -> Latent:
        """Whitened codes z = (h − μ) / σ of raw codes h (B, ...), zero where the mask (B, N) has no token."""
        z = (h - self.latent_mean.to(h)) / self.latent_std.to(h)
        return Latent(z if mask is None else torch.where(mask[..., None], z, 0), mask)

    def decode(self, latent: Latent) -> Tensor:
        """Decode latents to data (B, ...); a discrete bottleneck first quantizes them to the nearest code."""
        h = self.bottleneck.quantize(latent.z * self.latent_std + self.latent_mean)  # type: ignore[operator]
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

    def forward(
        self, x: Tensor, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Training: the reconstruction of x, the bottleneck's loss per item (B,), and scalars to log."""
        h, loss, info = self.bottleneck(self.encoder(x), generator)
        return self.decoder(h), loss, info

    @torch.no_grad()
    def learn_statistics(self, h: Tensor | Iterable[Tensor], floor: float = 1e-3) -> None:
        """Set μ and σ per channel from the raw codes h (N, C, ...) of the training set, or from batches of them.

        Of tokens, only those that items have, (M, D).

        A dead channel (σ below `floor` times the largest σ) gets that floor, so whitening does not amplify rounding.
        """
        mean, std = _mean_and_std([h] if isinstance(h, Tensor) else h)
        std = std.clamp(min=max(floor * float(std.max()), 1e-8))
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))

    @torch.no_grad()
    def learn_lengths(self, masks: Iterable[Tensor]) -> None:
        """Keep the numbers of tokens of some training items, from the masks (B, N) of all of them in batches."""
        counts = [torch.stack([part.sum(1) for part in self._split(mask)], 1) for mask in masks]
        lengths = torch.cat(counts)  # (items, S)
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
        self.lengths.copy_(lengths[order[torch.arange(OBSERVED_LENGTHS) % len(lengths)]])

    def length_mask(self, lengths: Tensor) -> Tensor | None:
        """The mask (B, N) of items with these numbers of tokens per segment (B, S); None if no item is padded."""
        capacity = self.segments or self.latent_shape[:1]
        if bool((lengths == torch.tensor(capacity)).all()):
            return None
        parts = [torch.arange(n) < length[:, None] for n, length in zip(capacity, lengths.T, strict=True)]
        mask = torch.cat(parts, 1)
        return mask if self.segments else mask[:, : int(lengths.max())]

    def _split(self, mask: Tensor) -> tuple[Tensor, ...]:
        """A mask (B, N) by segments."""
        return torch.split(mask, list(self.segments), 1) if self.segments else (mask,)


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
