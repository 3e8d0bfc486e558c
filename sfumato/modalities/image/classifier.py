"""A small image classifier, trained in half a minute: evaluates samples, provides features for a perceptual loss."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import OneCycleLR

from sfumato.types import UNKNOWN, Batch, batch_limit

MIN_SIDE = 8  # smallest image side, pixels
SYMMETRIES = 8  # symmetries of the square: the classes of the self-supervised task
MAX_MAP_SIDE = 32  # approximate side of the stem's map, pixels: the stem downsamples larger images to limit the cost
WEIGHT_DECAY = 0.02  # of AdamW
LABEL_SMOOTHING = 0.05  # of the cross-entropy
WARMUP = 0.2  # share of the steps in which the learning rate rises
MAX_EPOCHS_UNAUGMENTED = 3  # images are shifted in longer runs only (Fashion-MNIST: one epoch is 1 % better without)


class LabelledImages(Protocol):
    """A data set of images in [-1, 1] with labels (N,), or None."""

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, /) -> Batch: ...


def _stem_stride(side: int) -> int:
    """Stride 1 up to 47 pixels, 2 up to 95, 4 beyond."""
    return 1 if side < 1.5 * MAX_MAP_SIDE else 2 if side < 3 * MAX_MAP_SIDE else 4


def _stages(side: int) -> int:
    """Number of stages that halve the map to about 4 pixels: two to four."""
    return min(4, max(2, round(np.log2(side / 4))))


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class Stage(nn.Module):
    """A strided convolution that halves the map, then a residual one: (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, channels_in: int, channels_out: int, residual: bool = True) -> None:
        super().__init__()
        self.down = _conv(channels_in, channels_out, stride=2)
        self.residual = _conv(channels_out, channels_out) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', ceil(H/2), ceil(W/2))."""
        x = self.down(x)
        return x if self.residual is None else x + self.residual(x)


class Classifier(nn.Module):
    """A residual convolutional network with batch normalisation (frozen in `eval`).

    Args:
        shape: (C, H, W) of the images; the network accepts other sizes of at least 8 pixels too.
        classes: Number of classes.
        width: Channels of the stem; the stages have 2, 4, 4, ... times as many.

    Raises:
        ValueError: A side is shorter than 8 pixels, or there are no classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 24) -> None:
        super().__init__()
        channels, height, wide = shape
        side = min(height, wide)
        if side < MIN_SIDE or classes < 1:
            raise ValueError(f"classifier: needs sides >= {MIN_SIDE} and classes >= 1, got {shape} and {classes}")
        self.shape, self.classes, self.width = (channels, height, wide), classes, width
        stride = _stem_stride(side)
        sizes = [width, 2 * width] + [4 * width] * 3
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, stride + 2, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        # no residual convolution in the first stage: on the largest maps it would cost more than all the others
        stages = _stages(side // stride)
        self.stages = nn.ModuleList([Stage(sizes[i], sizes[i + 1], residual=i > 0) for i in range(stages)])
        self.neck = nn.Linear(4 * sizes[len(self.stages)], 4 * width)
        self.head = nn.Linear(4 * width, classes)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.head.in_features

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the stem and of each stage, fine to coarse: [(B, C_i, H_i, W_i)], all non-negative."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer: images (B, C, H, W) in [-1, 1] to (B, dim)."""
        x = F.adaptive_avg_pool2d(self.pyramid(x)[-1], 2)  # (B, C, 2, 2): keeps coarse positions
        return F.relu(self.neck(x.flatten(1)))

    def folded(self) -> "Classifier":
        """A faster copy with each batch normalisation (in `eval` mode) folded into its convolution."""
        net = copy.deepcopy(self).eval()
        for block in [part for part in net.modules() if isinstance(part, nn.Sequential)]:
            convolution, norm = block[0], block[1]
            assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            block[0] = fuse_conv_bn_eval(convolution, norm)
            del block[1]
        return net

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        return self.head(self.features(x))


def dihedral(x: Tensor, symmetry: Tensor) -> Tensor:
    """Apply a symmetry of the square to each image: bit 0 mirrors left-right, bit 1 top-bottom, bit 2 transposes.

    Args:
        x: Images (B, C, H, W); H = W if any is transposed.
        symmetry: Symmetry of each image, (B,) integers in [0, 8).
    """
    for bit, transform in enumerate((lambda v: v.flip(-1), lambda v: v.flip(-2), lambda v: v.transpose(-1, -2))):
        selected = (symmetry >> bit & 1).bool()
        if selected.any():
            x = torch.where(selected[:, None, None, None], transform(x), x)
    return x


def endless_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Full batches (batch_size,) of indices below `count`, from one random permutation after another, without end."""
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < batch_size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:batch_size]
        rest = rest[batch_size:]


def _shift(x: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift the whole batch by up to `max_shift` pixels each way, replicating the border."""
    down, right = torch.randint(0, 2 * max_shift + 1, (2,), generator=generator).tolist()
    padded = F.pad(x, (max_shift, max_shift, max_shift, max_shift), mode="replicate")
    return padded[..., down : down + x.shape[-2], right : right + x.shape[-1]]


class _Batches:
    """Endless batches (x, target): labelled images, or images under a random symmetry that is the target."""

    def __init__(
        self, data: LabelledImages, classes: int, batch_size: int, seed: int, device: torch.device, steps: int = 0
    ) -> None:
        self.data, self.device = data, device
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = tuple(data.batch(torch.arange(1)).data.shape[1:])
        self.labels = None if data.labels is None or classes < 2 else torch.from_numpy(data.labels)
        used = torch.ones(len(data), dtype=torch.bool) if self.labels is None else self.labels != UNKNOWN
        assert used.any(), "no image has a label"
        self.index = used.nonzero().flatten()
        batch_size = batch_limit(self.shape, batch_size)
        self.order = endless_batches(len(self.index), batch_size, self.generator)
        augment = steps * batch_size > MAX_EPOCHS_UNAUGMENTED * len(self.index)
        self.max_shift = max(1, min(self.shape[1:]) // 28) if augment else 0
        self.classes = SYMMETRIES if self.labels is None else classes
        self.symmetries = SYMMETRIES if self.shape[-1] == self.shape[-2] else 4  # only squares are transposed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self.order:
            index = self.index[chosen]
            x = self.data.batch(index).data
            x = _shift(x, self.max_shift, self.generator) if self.max_shift else x
            if self.labels is None:
                target = torch.randint(0, self.symmetries, (len(x),), generator=self.generator)
                x = dihedral(x, target)
            else:
                target = self.labels[index]
            yield x.to(self.device, memory_format=torch.channels_last), target.to(self.device)


def new_classifier(shape: tuple[int, ...], classes: int, width: int, seed: int, device: torch.device) -> Classifier:
    """A network whose initial weights depend on the seed alone; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier((shape[0], shape[1], shape[2]), classes, width)
    return net.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def one_cycle(optimizer: torch.optim.Optimizer, learning_rate: float, steps: int, warmup: float) -> OneCycleLR:
    """One-cycle schedule: rises to `learning_rate` over a share `warmup` of the steps, then falls to almost zero."""
    length = max(steps, 2)
    total = length + (length * warmup == 1)  # PyTorch divides 0 by 0 after a warm-up of exactly one step
    return OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=warmup)


def _train(net: Classifier, batches: _Batches, steps: int, learning_rate: float, bf16: bool) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = one_cycle(optimizer, learning_rate, steps, WARMUP)
    net.train()
    for x, target in islice(batches, steps):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=bf16):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def fit_classifier(
    data: LabelledImages,
    classes: int = 0,
    *,
    steps: int = 500,
    batch_size: int = 128,
    width: int = 24,
    learning_rate: float = 4e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    bf16: bool = False,
) -> Classifier:
    """Train a classifier on the labels, or, without labels, to predict which symmetry of the square was applied.

    The same data, seed and steps give the same weights on the same machine.

    Args:
        data: Images in [-1, 1]; those whose label is `UNKNOWN` are ignored.
        classes: Number of classes; below two, or without labels, all images are used for the self-supervised task of
            `SYMMETRIES` classes.
        steps: Optimizer steps.
        batch_size: Images per step; reduced for large images to bound the memory.
        width: Channels of the stem.
        learning_rate: Peak learning rate of AdamW (one-cycle schedule).
        seed: Seed of the weights, the order and the augmentation.
        device: Device of the training and of the result.
        bf16: Use bfloat16 autocast (faster on GPUs and on CPUs with AVX512-BF16 or AMX).

    Returns:
        The network in `eval` mode, its parameters frozen.

    References:
        Gidaris et al. 2018, Unsupervised Representation Learning by Predicting Image Rotations, arXiv:1803.07728.
    """
    batches = _Batches(data, classes, batch_size, seed, torch.device(device), steps)
    net = new_classifier(batches.shape, batches.classes, width, seed, batches.device)
    _train(net, batches, steps, learning_rate, bf16)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def predict(net: Classifier, x: Tensor, chunk: int = 1000) -> Tensor:
    """The most likely class of each image: (N, C, H, W) in [-1, 1] -> (N,) on the CPU."""
    device = net.head.weight.device
    parts = [net(part.to(device, memory_format=torch.channels_last)).argmax(1).cpu() for part in x.split(chunk)]
    return torch.cat(parts)
