"""Losses of image codecs: perceptual losses and the patch discriminator."""

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError


class PerceptualLoss(nn.Module):
    r"""Perceptual loss (LPIPS): distance of the unit-normalised feature maps of a frozen network.

    $d(\hat x, x) = \frac1L \sum_l \frac{1}{H_l W_l} \sum_{h,w,c} w_{lc} (\hat y_l - y_l)_{hwc}^2$ where $y_l$ is
    the map of layer l, divided by its norm along the channels. Only $\hat x$ receives a gradient.

    Args:
        pyramid: x (B, C, ...) -> maps (B, C_l, ...). A module, or the module of a method, is frozen and stays in eval
            mode; any other callable must have no trainable parameters.
        weights: Channel weights (C_l,) of each map, as in LPIPS; ones if None.
        eps: Added to the squared norms, to bound the gradient where a map is zero.

    References:
        Zhang et al. 2018, https://arxiv.org/abs/1801.03924, eq. 1
    """

    def __init__(
        self,
        pyramid: Callable[[Tensor], Sequence[Tensor]],
        weights: Sequence[Tensor] | None = None,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        owner = pyramid if isinstance(pyramid, nn.Module) else getattr(pyramid, "__self__", None)
        self.network = owner.requires_grad_(False).eval() if isinstance(owner, nn.Module) else None
        self.eps, self.pyramid = eps, pyramid.forward if isinstance(pyramid, nn.Module) else pyramid
        self.weights = nn.ParameterList(nn.Parameter(w.float(), requires_grad=False) for w in weights or ())

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Loss of each item, in float32: x̂ and x (B, C, ...) -> (B,)."""
        with torch.no_grad():
            maps = self.pyramid(x)
        weights = list(self.weights) or [None] * len(maps)
        layers = zip(self.pyramid(x_hat), maps, weights, strict=True)
        return torch.stack([self.layer_distance(y_hat.float(), y.float(), w) for y_hat, y, w in layers]).mean(0)

    def layer_distance(self, y_hat: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """Distance of each item between two maps (B, C, ...) -> (B,).

        The square is expanded, as sums along the channels need fewer passes over the maps than normalised maps do.
        """
        norm_hat, norm = y_hat.square().sum(1), y.square().sum(1)  # (B, ...)
        scale_hat, scale = torch.rsqrt(norm_hat + self.eps), torch.rsqrt(norm + self.eps)
        if weight is None:
            product = (y_hat * y).sum(1)
        else:
            squares = (y_hat**2, y**2, y_hat * y)
            norm_hat, norm, product = (torch.einsum("c,bc...->b...", weight, v) for v in squares)
        distance = norm_hat * scale_hat * scale_hat + norm * scale * scale - 2 * product * scale_hat * scale
        return distance.reshape(len(y), -1).mean(1)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        super().train(mode)
        if self.network is not None:
            self.network.eval()
        return self


class VGG16(nn.Module):
    """Feature pyramid of VGG-16: maps after relu1_2, 2_2, 3_3, 4_3 and 5_3 of images in [-1, 1].

    Parameter names are torchvision's (`features.0.weight`, ...). Gray images are repeated to three channels, channels
    beyond the third are dropped, and images below 32 pixels are enlarged.

    References:
        Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556, table 1, column D
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, self.outputs = 3, []
        for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convs):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.outputs.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> five maps (B, C_l, H_l, W_l)."""
        x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
        if min(x.shape[-2:]) < 32:
            x = F.interpolate(x, scale_factor=32 / min(x.shape[-2:]), mode="bilinear")
        x, maps = ((x + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.outputs:
                maps.append(x)
        return maps


def load_vgg(path: Path | None = None) -> PerceptualLoss | None:
    """Perceptual loss on VGG-16, or LPIPS, if the weights are available.

    Args:
        path: A safetensors file with torchvision's `features.*` and, for LPIPS, its `lin0.model.1.weight`, ...;
            default `$SFUMATO_VGG`.

    Returns:
        The loss, or None if neither path nor variable is set.

    Raises:
        UserError: The file is missing, or its weights do not match.
    """
    path = path or (Path(os.environ["SFUMATO_VGG"]) if os.environ.get("SFUMATO_VGG") else None)
    if path is None:
        return None
    state = _read_tensors(path)
    net = VGG16()
    try:
        net.load_state_dict({k: v for k, v in state.items() if k.startswith("features.")})
    except RuntimeError:
        raise UserError(
            f"{path}: not the weights of VGG-16 (torchvision's names, from features.0.weight on)", code=1
        ) from None
    weights = [state[k].flatten() for k in (f"lin{i}.model.1.weight" for i in range(5)) if k in state]
    return PerceptualLoss(net, weights if len(weights) == 5 else None)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the VGG weights: {error}", code=1) from error


class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator: x (B, C, H, W), H and W at least 8 -> logits (B, 1, h, w) of overlapping patches.

    A space-to-depth stem, then strided convolutions that double the width and halve the map, rounding up. GroupNorm
    allows any batch size. The receptive field is 10, 20, 40, 80, ... pixels for depth 0, 1, 2, 3, ...

    Args:
        in_channels: C.
        width: Channels after the stem; they grow to at most eight times as many.
        depth: Strided convolutions after the stem.

    References:
        Isola et al. 2017, https://arxiv.org/abs/1611.07004, section 3.2.2
    """

    def __init__(self, in_channels: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(depth + 1)]
        self.stem = nn.Conv2d(4 * in_channels, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(_groups(b), b) for b in widths[1:])
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), positive for real."""
        if min(x.shape[-2:]) < 8:
            raise UserError(f"the patch discriminator needs images of at least 8 x 8 pixels, not {tuple(x.shape[-2:])}")
        y = F.leaky_relu(self.stem(F.pixel_unshuffle(_even(x), 2)), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = F.leaky_relu(norm(conv(_even(y))), 0.2)
        return self.head(y)


def _groups(channels: int) -> int:
    """Number of groups: at most 32, of at least 8 channels each."""
    return next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0 and channels // n >= min(8, channels))


def _even(x: Tensor) -> Tensor:
    """Replicate the last row or column to make height and width even."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, width % 2, 0, height % 2), mode="replicate") if height % 2 or width % 2 else x
