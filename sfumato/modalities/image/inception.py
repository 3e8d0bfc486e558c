"""The Inception-v3 of the Fréchet inception distance (FID), for its published weights.

It differs from the usual one in three places: average pooling ignores the padding, the last block uses max pooling, and
there are 1,008 classes. Module names are those of the published weights.

References:
    Szegedy et al. 2016, Rethinking the Inception Architecture, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.metrics.features import NamedExtractor, weights_hash

INCEPTION_ENV = "SFUMATO_INCEPTION"  # environment variable with the path of the weights
Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.relu(self.bn(self.conv(x)))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """1x1, 5x5, double 3x3 and pooled branches: C -> 224 + pooled."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 224 + pooled, H, W)."""
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_mean(x))], 1)


class BlockB(nn.Module):
    """Halves the map: 288 -> 768."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 480, H/2, W/2)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """Branches of 1x7 and 7x1 convolutions: 768 -> 768."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        flat, tall = (0, 3), (3, 0)
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(channels, inner, 1), Conv(inner, inner, (1, 7), padding=flat)
        self.branch7x7_3 = Conv(inner, 192, (7, 1), padding=tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(channels, inner, 1), Conv(inner, inner, (7, 1), padding=tall)
        self.branch7x7dbl_3 = Conv(inner, inner, (1, 7), padding=flat)
        self.branch7x7dbl_4 = Conv(inner, inner, (7, 1), padding=tall)
        self.branch7x7dbl_5 = Conv(inner, 192, (1, 7), padding=flat)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 768, H, W)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean(x))], 1)


class BlockD(nn.Module):
    """Halves the map: 768 -> 1280."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(channels, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(channels, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 512, H/2, W/2)."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """Branches that split into 1x3 and 3x1: C -> 2048. The last block of the network uses max pooling."""

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.branch1x1, self.branch3x3_1 = Conv(channels, 320, 1), Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2048, H, W)."""
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.last else _mean(x)
        split = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        split += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Images (B, 1 or 3, H, W) in [-1, 1], resized to 299 pixels -> 2,048 pooled features."""

    def __init__(self, classes: int = 1008) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, last=False), BlockE(2048, last=True)
        self.fc = nn.Linear(2048, classes)  # not used by the features, but part of the published weights

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048)."""
        x = F.interpolate(x[:, :3].expand(-1, 3, -1, -1), (299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))


def find_inception(cache: Path | None = None) -> Path | None:
    """Path of the FID weights: SFUMATO_INCEPTION, else `*inception*.safetensors` in `cache`; None if there is none.

    Raises:
        UserError: The file that the variable names does not exist.
    """
    path = os.environ.get(INCEPTION_ENV)
    if path:
        if not Path(path).is_file():
            raise UserError(f"{INCEPTION_ENV}: no file {path}; unset it to use other features")
        return Path(path)
    return next(iter(sorted(cache.glob("*inception*.safetensors"))), None) if cache is not None else None


def inception_extractor(path: Path, device: str | torch.device = "cpu") -> NamedExtractor:
    """The 2,048 pooled features of the Inception-v3 of FID.

    Args:
        path: Weights as safetensors, with the keys of `pt_inception-2015-12-05-6726825d.pth`.
        device: Where to compute.

    Raises:
        UserError: The weights do not match.
    """
    net = Inception()
    missing, unexpected = net.load_state_dict(
        {k: v for k, v in load_file(path).items() if not k.startswith("AuxLogits.")}, strict=False
    )
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(f"{path}: not the weights of the FID Inception ({(missing + unexpected)[0]} does not match)", 1)
    net = net.to(device).eval().requires_grad_(False)
    return NamedExtractor(f"inception-{weights_hash(net.state_dict())}", net, device)
