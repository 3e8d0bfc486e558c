"""Convolutional autoencoder for images of any height, width and number of channels."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.codecs.base import Codec
from sfumato.codecs.bottleneck import make_bottleneck
from sfumato.errors import UserError
from sfumato.types import Latent

LITTLE_NOISE = -4.0  # log variance of a posterior before training
LOOKED_AT = 3_000_000  # numbers of images that the linear start is computed from


def _norm(width: int) -> nn.GroupNorm:
    """Groups of 16 channels, or of somewhat more where 16 do not go evenly into the width."""
    return nn.GroupNorm(next(n for n in range(max(1, width // 16), 0, -1) if width % n == 0), width)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the last convolution starts at zero (Zhang et al. 2019, Fixup)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.silu(self.conv_in(F.silu(self.norm(x)))))


def stage_widths(width: int, stem: int, downsample: int, limit: int = 4) -> list[int]:
    """Channels at strides stem, 2·stem, …, downsample: doubled each time, at most `limit` times the first."""
    stages = (downsample // stem).bit_length()
    return [min(width * 2**i, width * limit) for i in range(stages)]


class Encoder(nn.Module):
    """Image (B, C, H, W) in [−1, 1] -> raw codes (B, out, ⌈H/f⌉, ⌈W/f⌉).

    The stem folds s×s pixels into channels before the first convolution, so that no work is done at full resolution.
    A linear map of each f×f patch runs beside the network, which starts at zero and learns what is missing.
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
        self.conv_out = nn.Conv2d(widths[-1], out, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def padded(self, x: Tensor) -> Tensor:
        """Images with their last row and column repeated up to whole patches."""
        f = self.downsample
        return F.pad(x, (0, -x.shape[-1] % f, 0, -x.shape[-2] % f), mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(x)
        h = self.body(self.conv_in(F.pixel_unshuffle(x, self.stem)))  # (B, W, H/f, W/f)
        return self.patch(x) + self.conv_out(F.silu(self.norm(h)))  # (B, out, H/f, W/f)


class Decoder(nn.Module):
    """Raw codes (B, c, h, w) -> image (B, C, H, W), cropped to the size asked for.

    One more stage than the encoder has, at half the stem's stride, draws the fine texture.
    """

    def __init__(
        self, channels: int, inp: int, widths: list[int], depth: int, stem: int, downsample: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.size, self.last = size, max(1, stem // 2)
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
        self.conv_out = nn.Conv2d(widths[-1], channels * self.last**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        y = self.conv_out(F.silu(self.norm(self.body(self.conv_in(h)))))
        x = self.patch(h) + F.pixel_shuffle(y, self.last)
        return x[..., : self.size[0], : self.size[1]]


def start_linear(encode: nn.Conv2d, decode: nn.ConvTranspose2d, x: Tensor, most: int = 20_000) -> None:
    """Set both maps of patches to what loses least of images x (N, C, H, W), whose sides are multiples of f.

    Codes are p V / s and patches c + (code · s) Vᵀ, with p the patch around the mean colour c, V its first principal
    directions and s their standard deviations. If `encode` puts out more channels than `decode` takes, the further
    ones (log variances of a posterior) start constant, at little noise.

    Args:
        encode: (C, f, f) -> code.
        decode: Code -> (C, f, f).
        x: Images in [−1, 1].
        most: Patches looked at.
    """
    f, count = decode.kernel_size[0], decode.in_channels
    colour = x.mean((0, 2, 3))  # (C,)
    patches = F.unfold(x - colour[:, None, None], f, stride=f).transpose(1, 2).flatten(0, 1)  # (N P, C f f)
    patches = patches[:: max(1, len(patches) // most)]
    with torch.random.fork_rng(devices=[]):  # the same directions whatever was drawn before
        torch.manual_seed(0)
        _, values, vectors = torch.svd_lowrank(patches, min(2 * count + 16, *patches.shape), niter=4)
    known = min(count, int((values > 1e-3 * values[0]).sum()))  # flat or tiny patches have no more directions
    spread, vectors = values[:known] / len(patches) ** 0.5, vectors[:, :known]
    to_code, to_patch = ((vectors * s).T.reshape(known, x.shape[1], f, f) for s in (1 / spread, spread))
    assert encode.bias is not None and decode.bias is not None
    encode.weight.zero_()
    encode.bias.zero_()
    encode.bias[count:] = LITTLE_NOISE
    encode.weight[:known] = to_code.to(encode.weight)
    encode.bias[:known] = -(to_code.sum((2, 3)) @ colour).to(encode.bias)
    decode.weight[:known] = to_patch.to(decode.weight)
    decode.bias.copy_(colour)


class ToVector(nn.Module):
    """Raw codes as one vector: grid (B, c, h, w) -> (B, out)."""

    def __init__(self, network: nn.Module, channels: int, grid: tuple[int, int], out: int) -> None:
        super().__init__()
        self.network = network
        self.linear = nn.Linear(channels * grid[0] * grid[1], out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x).flatten(1))


class FromVector(nn.Module):
    """A vector (B, in) unfolded to a grid for the decoder."""

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
        channels: c, numbers per latent position (for `fsq` without `levels` each channel has the default levels).
        latent_dim: Makes the latent one vector of this length instead of a grid; 0 for a grid.
        width: Channels of the finest encoder stage; doubled at each halving, up to four times.
        depth: Residual blocks per stage.
        codebook_size: Codes of `vq`.
        groups: Codes per position of `vq`.
        levels: Levels per channel of `fsq`.

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
        count, height, wide = shape
        grid = (math.ceil(height / downsample), math.ceil(wide / downsample))
        options: dict[str, Any] = {"size": codebook_size, "groups": groups} if bottleneck == "vq" else {}
        if bottleneck == "fsq" and levels:
            options["levels"] = tuple(levels)
        neck = make_bottleneck(bottleneck, latent_dim or channels, **options)
        super().__init__((latent_dim,) if latent_dim else (channels, *grid))
        stem = min(downsample, 4)
        widths = stage_widths(width, stem, downsample)
        inside = widths[-1] if latent_dim else neck.in_channels
        encoder = Encoder(count, inside, widths, depth, stem, downsample)
        decoder = Decoder(
            count, widths[-1] if latent_dim else neck.out_channels, widths, depth, stem, downsample, (height, wide)
        )
        self.bottleneck = neck
        self.encoder = ToVector(encoder, inside, grid, neck.in_channels) if latent_dim else encoder
        self.decoder = FromVector(decoder, widths[-1], grid, neck.out_channels) if latent_dim else decoder
        self.downsample = downsample
        self.prepares = max(1, LOOKED_AT // math.prod(shape))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Start as the best linear codec of patches: raw codes are their first principal components, of variance 1.

        Only a grid has patches; a vector starts at random.
        """
        if len(self.latent_shape) > 1:
            encoder, decoder = cast(Encoder, self.encoder), cast(Decoder, self.decoder)
            start_linear(encoder.patch, decoder.patch, encoder.padded(x))

    def decode(self, latent: Latent | Tensor) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] of latents z."""
        return super().decode(latent).clamp(-1, 1)

    def untouched(self, mask: Tensor, present: bool = True) -> Tensor:
        if len(self.latent_shape) == 1:
            return super().untouched(mask)
        f = self.downsample
        return F.max_pool2d(mask[:, None].float(), f, f, ceil_mode=True) == 0  # (B, 1, h, w)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights that draw the pixels: where gradients of the losses are compared."""
        decoder = self.decoder.network if isinstance(self.decoder, FromVector) else self.decoder
        return decoder.conv_out.weight  # type: ignore[union-attr,return-value]
