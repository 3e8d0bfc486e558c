"""What a codec is trained on: reconstruction, perceptual distance, and a patch discriminator kept on a short lead."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError

RECONSTRUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda x_hat, x: (x_hat - x).abs(),
    "l2": lambda x_hat, x: (x_hat - x).square(),
}


def reconstruction(x_hat: Tensor, x: Tensor, kind: str = "l1") -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error of each item, in float32: (B, ...) twice -> (B,)."""
    if kind not in RECONSTRUCTIONS:
        raise UserError(f"unknown reconstruction loss {kind!r}: choose one of {', '.join(RECONSTRUCTIONS)}")
    return RECONSTRUCTIONS[kind](x_hat.float(), x.float()).flatten(1).mean(1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradient flows through the module inside the block, but none reaches its parameters, nor costs anything."""
    held = [p for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


# perceptual distance


class Perceptual(nn.Module):
    r"""Distance between the feature maps of a frozen network, each position scaled to unit length.

    $d(\hat x, x) = \frac1L \sum_l \frac{1}{H_l W_l} \sum_{h,w,c} w_{lc} (\hat y_l - y_l)_{hwc}^2$ where $y_l$ is
    layer l's map over its norm along the channels. Gradient reaches $\hat x$, never x nor the network.

    Args:
        pyramid: x (B, C, ...) -> maps (B, C_l, ...). If it is a module, or a method of one, that module is frozen here
            and stays in eval mode; any other callable must hold nothing that is being trained.
        weights: A weight (C_l,) on the squares of each map's channels, such as those of LPIPS; ones if None.
        eps: Added to the squared norms, so that empty positions give no wild gradient.

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
        """Distance of each item, in float32: (B, C, ...) twice -> (B,)."""
        with torch.no_grad():
            wanted = self.pyramid(x)
        weights = list(self.weights) or [None] * len(wanted)
        layers = zip(self.pyramid(x_hat), wanted, weights, strict=True)
        return torch.stack([self.apart(y_hat.float(), y.float(), w) for y_hat, y, w in layers]).mean(0)

    def apart(self, y_hat: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """Distance of each item between two maps (B, C, ...) -> (B,).

        The square is multiplied out: sums along the channels pass over the maps much less often than maps scaled to
        unit length would.
        """
        own, given = y_hat.square().sum(1), y.square().sum(1)  # (B, ...)
        scale_hat, scale = torch.rsqrt(own + self.eps), torch.rsqrt(given + self.eps)
        if weight is None:
            both = (y_hat * y).sum(1)
        else:
            own, given, both = (torch.einsum("c,bc...->b...", weight, v) for v in (y_hat**2, y**2, y_hat * y))
        squares = own * scale_hat * scale_hat + given * scale * scale - 2 * both * scale_hat * scale
        return squares.reshape(len(y), -1).mean(1)

    def train(self, mode: bool = True) -> "Perceptual":
        super().train(mode)
        if self.network is not None:
            self.network.eval()
        return self


class VGG16(nn.Module):
    """The convolutions of VGG-16 as a pyramid: maps after relu1_2, 2_2, 3_3, 4_3 and 5_3 of images in [-1, 1].

    Parameter names are torchvision's (`features.0.weight`, ...). Gray images are repeated to three channels, further
    channels than three are left out; images under 32 pixels are enlarged.

    References:
        Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556, table 1, column D
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, self.taps = 3, []
        for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convs):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.taps.append(len(layers) - 1)
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
            if i in self.taps:
                maps.append(x)
        return maps


def load_vgg(path: Path | None = None) -> Perceptual | None:
    """Perceptual distance on VGG-16, if its weights are at hand.

    Args:
        path: A safetensors file with torchvision's `features.*` and, if LPIPS is wanted, its `lin0.model.1.weight`,
            ...; `$SFUMATO_VGG` if None.

    Returns:
        The distance, or None where neither path nor variable is set.

    Raises:
        UserError: The file is missing or holds something else.
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
    lins = [state[k].flatten() for k in (f"lin{i}.model.1.weight" for i in range(5)) if k in state]
    return Perceptual(net, lins if len(lins) == 5 else None)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read these VGG weights: {error}", code=1) from error


# adversary


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: x (B, C, H, W), H and W at least 8 and of any parity -> logits (B, 1, h, w).

    A space-to-depth stem, then strided convolutions that double the width; each halves the map, rounding up. GroupNorm,
    so that any batch size will do. One logit sees 10, 20, 40, 80, ... pixels each way for depth 0, 1, 2, 3, ...

    Args:
        in_channels: C.
        width: Channels after the stem; at most eight times as many later.
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
    """Groups of 8 channels or more, 32 at most."""
    return next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0 and channels // n >= min(8, channels))


def _even(x: Tensor) -> Tensor:
    """Repeat the last row and column where their number is odd."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, width % 2, 0, height % 2), mode="replicate") if height % 2 or width % 2 else x


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    r"""The discriminator's loss $\tfrac12 E[(1 - D(x))_+] + \tfrac12 E[(1 + D(\hat x))_+]$ of each item.

    Args:
        real: Logits of data, (B, 1, h, w).
        fake: Logits of reconstructions, which were detached, same shape.

    References:
        Lim & Ye 2017, https://arxiv.org/abs/1705.02894
    """
    return (F.relu(1 - real.float()) + F.relu(1 + fake.float())).flatten(1).mean(1) / 2


def hinge_g(fake: Tensor) -> Tensor:
    """The codec's adversarial loss, -D(x_hat), of each item: logits (B, 1, h, w) -> (B,)."""
    return -fake.float().flatten(1).mean(1)


def adaptive_weight(rec_loss: Tensor, adv_loss: Tensor, last_layer: Tensor, maximum: float = 100.0) -> Tensor:
    r"""Weight that makes the adversarial gradient as long as the other: $\lVert g_r \rVert/\lVert g_a \rVert$.

    Args:
        rec_loss: Scalar, with perceptual terms if there are any.
        adv_loss: Scalar.
        last_layer: Where gradients are compared: the weight of the decoder's last layer; or x_hat itself, which is
            cheaper, as the decoder is not gone through.
        maximum: Largest weight.

    Returns:
        Scalar without gradient; nothing is accumulated in any `.grad`. Zero if a gradient is not finite.

    References:
        Esser et al. 2021, https://arxiv.org/abs/2012.09841, eq. 7
    """
    rec, adv = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (rec_loss, adv_loss))
    weight = (rec.norm() / adv.norm().clamp(min=1e-12)).clamp(max=maximum)
    return torch.where(torch.isfinite(weight), weight, 0.0).detach()


class AdversarialGate(nn.Module):
    """How much of the adversarial loss the codec gets: none before `start`, then a ramp, less from a perfect judge.

    A discriminator that is nearly always right knows a difference that the codec cannot mend yet, and its gradient
    only destroys. So with the moving average a of its accuracy the ramp is multiplied by a line in a: 1 up to `trust`,
    `least` from `doubt` on. The average is a buffer, the step is given: a resumed run goes on as it was.

    Args:
        start: First step with any adversarial loss; the discriminator should be trained, and `update` called, before.
        ramp: Steps from none to all of it.
        trust: Accuracy up to which nothing is held back.
        doubt: Accuracy from which only `least` is let through.
        least: What is let through then; above 0 if the codec is to catch up by the adversarial loss itself.
        decay: Of the moving average.
    """

    accuracy: Tensor

    def __init__(
        self,
        start: int,
        ramp: int = 1,
        trust: float = 0.9,
        doubt: float = 0.97,
        least: float = 0.0,
        decay: float = 0.98,
    ) -> None:
        super().__init__()
        assert trust < doubt, "the gate closes as accuracy grows"
        self.start, self.ramp, self.trust, self.doubt, self.least = start, max(ramp, 1), trust, doubt, least
        self.decay = decay
        self.register_buffer("accuracy", torch.tensor(0.5))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Take in the logits of a discriminator step: the share of patches judged right."""
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        self.accuracy.lerp_(right, 1 - self.decay)

    def forward(self, step: int) -> Tensor:
        """Share of the adversarial loss at this optimizer step, scalar in 0..1."""
        ramp = min(max((step - self.start) / self.ramp, 0.0), 1.0)
        room = ((self.doubt - self.accuracy) / (self.doubt - self.trust)).clamp(0, 1)
        return ramp * (self.least + (1 - self.least) * room)
