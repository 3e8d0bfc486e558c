"""Convolutional autoencoder for images of any height, width and number of channels."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.codecs.base import Codec
from sfumato.codecs.bottleneck import make_bottleneck
from sfumato.errors import UserError
from sfumato.nn.layers import zero_init
from sfumato.types import Latent

INITIAL_LOG_VARIANCE = -4.0  # log variance of the posterior before training
PCA_VALUES = 3_000_000  # pixel values that the PCA initialisation uses, at most
PCA_PATCHES = 20_000  # patches that the principal axes are computed from, at most
MIN_SINGULAR_VALUE = 1e-3  # share of the largest one; flat or tiny patches have fewer components


def _norm(width: int) -> nn.GroupNorm:
    """Group norm with groups of 16 channels, or of more if 16 does not divide the width."""
    return nn.GroupNorm(next(n for n in range(max(1, width // 16), 0, -1) if width % n == 0), width)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution zero-initialised (Zhang et al. 2019, Fixup)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = zero_init(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.silu(self.conv_in(F.silu(self.norm(x)))))


def stage_widths(width: int, stem: int, downsample: int, limit: int = 4) -> list[int]:
    """Channels at strides stem, 2·stem, …, downsample: doubled each time, up to `limit` times the first."""
    stages = (downsample // stem).bit_length()
    return [min(width * 2**i, width * limit) for i in range(stages)]


class Encoder(nn.Module):
    """Image (B, C, H, W) in [−1, 1] -> raw codes (B, out, ⌈H/f⌉, ⌈W/f⌉).

    The stem folds s×s pixels into channels, so that no convolution runs at full resolution. The output is a linear map
    of each f×f patch plus the network's, which is zero-initialised and learns the residual.
    """

    def __init__(self, channels: int, out: int, widths: list[int], depth: int, stem: int, downsample: int) -> None:
        super().__init__()
        self.stem, self.downsample = stem, downsample
        self.patch = nn.Conv2d(channels, out, downsample, downsample)
        self.conv_in = nn.Conv2d(channels * stem**2, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(widths[i - 1] * 4, width, 1)]
            layers += [ResBlock(width) for _ in range(depth)]
        self.body = nn.Sequential(*layers)
        self.norm = _norm(widths[-1])
        self.conv_out = zero_init(nn.Conv2d(widths[-1], out, 1))

    def pad(self, x: Tensor) -> Tensor:
        """Images padded to whole patches by replicating the last row and column."""
        f = self.downsample
        return F.pad(x, (0, -x.shape[-1] % f, 0, -x.shape[-2] % f), mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        h = self.body(self.conv_in(F.pixel_unshuffle(x, self.stem)))  # (B, W, H/f, W/f)
        return self.patch(x) + self.conv_out(F.silu(self.norm(h)))  # (B, out, H/f, W/f)


class Decoder(nn.Module):
    """Raw codes (B, c, h, w) -> image (B, C, H, W), cropped to `size`.

    One stage more than the encoder, at half the stem's stride, for fine texture.
    """

    def __init__(
        self, channels: int, inp: int, widths: list[int], depth: int, stem: int, downsample: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.size, self.output_stride = size, max(1, stem // 2)
        self.patch = nn.ConvTranspose2d(inp, channels, downsample, downsample)
        widths = widths[::-1] + ([max(1, widths[0] // 2)] if stem > 1 else [])
        self.conv_in = nn.Conv2d(inp, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i:
                layers += [nn.Conv2d(widths[i - 1], width * 4, 1), nn.PixelShuffle(2)]
            layers += [ResBlock(width) for _ in range(depth if i < len(widths) - 1 or stem == 1 else 1)]
        self.body = nn.Sequential(*layers)
        self.norm = _norm(widths[-1])
        self.conv_out = zero_init(nn.Conv2d(widths[-1], channels * self.output_stride**2, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        y = self.conv_out(F.silu(self.norm(self.body(self.conv_in(h)))))
        x = self.patch(h) + F.pixel_shuffle(y, self.output_stride)
        return x[..., : self.size[0], : self.size[1]]


def initialise_pca(encode: nn.Conv2d, decode: nn.ConvTranspose2d, x: Tensor) -> None:
    """Initialise both maps of patches by PCA of images x (N, C, H, W), whose sides are multiples of f.

    Codes are (p - c) V / s and patches c + (code · s) Vᵀ, with p the patch, c the mean colour, V the first principal
    axes and s their standard deviations. If `encode` has more outputs than `decode` has inputs, the others (log
    variances of the posterior) start at `INITIAL_LOG_VARIANCE`.

    Args:
        encode: (C, f, f) -> code.
        decode: Code -> (C, f, f).
        x: Images in [−1, 1].
    """
    f, count = decode.kernel_size[0], decode.in_channels
    colour = x.mean((0, 2, 3))  # (C,)
    patches = F.unfold(x - colour[:, None, None], f, stride=f).transpose(1, 2).flatten(0, 1)  # (N P, C f f)
    patches = patches[:: max(1, len(patches) // PCA_PATCHES)]
    with torch.random.fork_rng(devices=[]):  # the same axes whatever the global random state
        torch.manual_seed(0)
        _, values, axes = torch.svd_lowrank(patches, min(2 * count + 16, *patches.shape), niter=4)
    rank = min(count, int((values > MIN_SINGULAR_VALUE * values[0]).sum()))
    std, axes = values[:rank] / len(patches) ** 0.5, axes[:, :rank]
    to_code, to_patch = ((axes * s).T.reshape(rank, x.shape[1], f, f) for s in (1 / std, std))
    assert encode.bias is not None and decode.bias is not None
    encode.weight.zero_()
    encode.bias.zero_()
    encode.bias[count:] = INITIAL_LOG_VARIANCE
    encode.weight[:rank] = to_code.to(encode.weight)
    encode.bias[:rank] = -(to_code.sum((2, 3)) @ colour).to(encode.bias)
    decode.weight[:rank] = to_patch.to(decode.weight)
    decode.bias.copy_(colour)


class ToVector(nn.Module):
    """Encoder whose raw code is one vector: the grid (B, c, h, w) of `network` -> (B, out)."""

    def __init__(self, network: nn.Module, channels: int, grid: tuple[int, int], out: int) -> None:
        super().__init__()
        self.network = network
        self.linear = nn.Linear(channels * grid[0] * grid[1], out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x).flatten(1))


class FromVector(nn.Module):
    """Decoder of one vector: (B, inp) -> a grid (B, c, h, w) for `network`."""

    def __init__(self, network: nn.Module, channels: int, grid: tuple[int, int], inp: int) -> None:
        super().__init__()
        self.shape = (channels, *grid)
        self.linear = nn.Linear(inp, channels * grid[0] * grid[1])
        self.network = network

    def forward(self, h: Tensor) -> Tensor:
        return self.network(self.linear(h).unflatten(1, self.shape))


class ImageCodec(Codec):
    """Autoencoder for images (B, C, H, W) in [−1, 1], any H, W, C.

    Args:
        shape: (C, H, W) of the images.
        bottleneck: `kl` (continuous), `vq` or `fsq` (discrete), `none` (plain autoencoder).
        downsample: f, a power of two: pixels per latent position along a side.
        channels: c, channels per latent position.
        latent_dim: Length of the latent if it is one vector; 0 for a grid.
        width: Channels of the finest encoder stage; doubled at each stage, up to four times.
        depth: Residual blocks per stage.
        codebook_size: Codes of `vq`.
        groups: Codes per position of `vq`.
        levels: Levels per channel of `fsq`; None for the defaults.

    References:
        Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, section 3.1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        bottleneck: str = "kl",
        downsample: int = 8,
        channels: int = 4,
        latent_dim: int = 0,
        width: int = 64,
        depth: int = 1,
        codebook_size: int = 512,
        groups: int = 1,
        levels: tuple[int, ...] | None = None,
    ) -> None:
        if downsample < 1 or downsample & (downsample - 1):
            raise UserError(f"codec.downsample={downsample} must be a power of two")
        image_channels, height, image_width = shape
        grid = (math.ceil(height / downsample), math.ceil(image_width / downsample))
        options: dict[str, Any] = {"size": codebook_size, "groups": groups} if bottleneck == "vq" else {}
        if bottleneck == "fsq" and levels:
            options["levels"] = tuple(levels)
        neck = make_bottleneck(bottleneck, latent_dim or channels, **options)
        super().__init__((latent_dim,) if latent_dim else (channels, *grid))
        stem = min(downsample, 4)
        widths = stage_widths(width, stem, downsample)
        encoded = widths[-1] if latent_dim else neck.in_channels
        decoded = widths[-1] if latent_dim else neck.out_channels
        encoder = Encoder(image_channels, encoded, widths, depth, stem, downsample)
        decoder = Decoder(image_channels, decoded, widths, depth, stem, downsample, (height, image_width))
        self.bottleneck = neck
        self.encoder = ToVector(encoder, encoded, grid, neck.in_channels) if latent_dim else encoder
        self.decoder = FromVector(decoder, decoded, grid, neck.out_channels) if latent_dim else decoder
        self.downsample = downsample
        self.prepare_items = max(1, PCA_VALUES // math.prod(shape))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """PCA initialisation: raw codes are the first principal components of patches, of unit variance.

        A vector latent keeps its random initialisation.
        """
        if len(self.latent_shape) > 1:
            encoder, decoder = cast(Encoder, self.encoder), cast(Decoder, self.decoder)
            initialise_pca(encoder.patch, decoder.patch, encoder.pad(x))

    def decode(self, latent: Latent) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] of latents."""
        return super().decode(latent).clamp(-1, 1)

    def unmasked(self, mask: Tensor, present: bool = True) -> Tensor:
        if len(self.latent_shape) == 1:
            return super().unmasked(mask)
        f = self.downsample
        return F.max_pool2d(mask[:, None].float(), f, f, ceil_mode=True) == 0  # (B, 1, h, w)

    @property
    def last_layer(self) -> nn.Parameter:
        """Last layer's weights, on which the gradient norms of the losses are compared."""
        decoder = self.decoder.network if isinstance(self.decoder, FromVector) else self.decoder
        return decoder.conv_out.weight  # type: ignore[union-attr,return-value]
