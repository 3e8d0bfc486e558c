"""A small image classifier: trained in half a minute, it judges samples and lends its features to a perceptual loss."""

import copy
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import OneCycleLR

from sfumato.types import UNKNOWN, Batch, at_once

SMALLEST = 8  # pixels a side
SYMMETRIES = 8  # classes of the self-supervised task
LARGEST_MAP = 32  # the stem halves images until its map is about this large, so that cost grows slowly with the image


class Images(Protocol):
    """What the classifier asks of a data set: its length, its labels (N,) or None, and batches of images in [-1, 1]."""

    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, /) -> Batch: ...


def _stem_stride(side: int) -> int:
    """1 up to 47 pixels, 2 up to 95, 4 beyond."""
    return 1 if side < 1.5 * LARGEST_MAP else 2 if side < 3 * LARGEST_MAP else 4


def _stages(side: int) -> int:
    """Halvings until the map is about 4 pixels wide: two to four."""
    return min(4, max(2, round(np.log2(side / 4))))


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class Stage(nn.Module):
    """Halves the map, then adds one residual convolution: (B, C, H, W) -> (B, C', H/2, W/2)."""

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
        shape: (C, H, W) of the images it is built for; other sizes of at least 8 pixels run too.
        classes: Number of classes.
        width: Channels of the stem; the stages have 2, 4, 4, ... times as many.

    Raises:
        ValueError: A side is under 8 pixels or there are no classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 24) -> None:
        super().__init__()
        channels, height, wide = shape
        side = min(height, wide)
        if side < SMALLEST or classes < 1:
            raise ValueError(f"classifier: needs sides >= {SMALLEST} and classes >= 1, got {shape} and {classes}")
        self.shape, self.classes, self.width = (channels, height, wide), classes, width
        stride = _stem_stride(side)
        sizes = [width, 2 * width] + [4 * width] * 3
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, stride + 2, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        # the first stage works on the largest maps: a residual there would cost more than all the others
        stages = _stages(side // stride)
        self.stages = nn.ModuleList([Stage(sizes[i], sizes[i + 1], residual=i > 0) for i in range(stages)])
        self.neck = nn.Linear(4 * sizes[len(self.stages)], 4 * width)
        self.head = nn.Linear(4 * width, classes)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.head.in_features

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps from fine to coarse, after the stem and after each stage: [(B, C_i, H_i, W_i)], all non-negative."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer: images (B, C, H, W) in [-1, 1] to (B, dim)."""
        x = F.adaptive_avg_pool2d(self.pyramid(x)[-1], 2)  # (B, C, 2, 2): a trace of where things are
        return F.relu(self.neck(x.flatten(1)))

    def folded(self) -> "Classifier":
        """A copy whose batch normalisations, as in `eval`, are part of the convolutions: the same, but faster."""
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


def dihedral(x: Tensor, which: Tensor) -> Tensor:
    """Applies to each image one symmetry of the square: bit 0 mirrors left-right, bit 1 top-bottom, bit 2 transposes.

    Args:
        x: Images (B, C, H, W); H = W where a transposition occurs.
        which: Symmetry of each image, (B,) integers in [0, 8).
    """
    for bit, move in enumerate((lambda v: v.flip(-1), lambda v: v.flip(-2), lambda v: v.transpose(-1, -2))):
        chosen = (which >> bit & 1).bool()
        if chosen.any():
            x = torch.where(chosen[:, None, None, None], move(x), x)
    return x


def endless(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Full batches (batch,) from one permutation after another, for ever."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def _shift(x: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Moves the whole batch by up to `by` pixels each way; the border is repeated."""
    down, right = torch.randint(0, 2 * by + 1, (2,), generator=generator).tolist()
    padded = F.pad(x, (by, by, by, by), mode="replicate")
    return padded[..., down : down + x.shape[-2], right : right + x.shape[-1]]


class _Lessons:
    """Batches (x, target) for ever: labelled images, or images under a symmetry that is to be told."""

    def __init__(self, data: Images, classes: int, batch: int, seed: int, device: torch.device, steps: int = 0) -> None:
        self.data, self.device = data, device
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = tuple(data.batch(torch.arange(1)).data.shape[1:])
        known = np.arange(len(data)) if data.labels is None else np.flatnonzero(data.labels != UNKNOWN)
        self.pretext = data.labels is None or classes < 2
        assert self.pretext or len(known), "no image has a label"
        self.rows = torch.arange(len(data)) if self.pretext else torch.from_numpy(known)
        batch = at_once(self.shape, batch)
        self.order = endless(len(self.rows), batch, self.generator)
        # images seen a few times only need no variation (measured on Fashion-MNIST: one pass is 1 % better without)
        self.shift = max(1, min(self.shape[1:]) // 28) if steps * batch > 3 * len(self.rows) else 0
        self.classes = SYMMETRIES if self.pretext else classes
        self.moves = SYMMETRIES if self.shape[-1] == self.shape[-2] else 4  # only squares are transposed

    def draw(self) -> tuple[Tensor, Tensor]:
        batch = self.data.batch(self.rows[next(self.order)])
        x = _shift(batch.data, self.shift, self.generator) if self.shift else batch.data
        target = batch.label
        if self.pretext:
            target = torch.randint(0, self.moves, (len(x),), generator=self.generator)
            x = dihedral(x, target)
        assert target is not None
        return x.to(self.device, memory_format=torch.channels_last), target.to(self.device)


def fresh(shape: tuple[int, ...], classes: int, width: int, seed: int, device: torch.device) -> Classifier:
    """A new network whose weights depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier((shape[0], shape[1], shape[2]), classes, width)
    return net.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def one_cycle(optimizer: torch.optim.Optimizer, rate: float, steps: int, rise: float) -> OneCycleLR:
    """A rate that rises to `rate` over a share of the steps, and falls to about none."""
    length = max(steps, 2)
    return OneCycleLR(optimizer, rate, total_steps=length + (length * rise == 1), pct_start=rise)  # 0/0 at a rise of 1


def _train(net: Classifier, lessons: _Lessons, steps: int, rate: float, bf16: bool) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.02, fused=True)
    schedule = one_cycle(optimizer, rate, steps, rise=0.2)
    net.train()
    for _ in range(steps):
        x, target = lessons.draw()
        with torch.autocast(lessons.device.type, torch.bfloat16, enabled=bf16):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def fit_classifier(
    data: Images,
    classes: int = 0,
    *,
    steps: int = 500,
    batch: int = 128,
    width: int = 24,
    rate: float = 4e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    bf16: bool = False,
) -> Classifier:
    """Trains a classifier on the labels, or, without labels, to tell which symmetry of the square was applied.

    The same data, seed and steps give the same weights on the same machine.

    Args:
        data: Images in [-1, 1] with `labels` or None; those whose label is `UNKNOWN` are left out.
        classes: Number of classes; under two, or without labels, the self-supervised task (`SYMMETRIES` classes)
            is used instead, on all images.
        steps: Optimizer steps.
        batch: Images a step; fewer of large ones, for memory.
        width: Channels of the stem.
        rate: Peak learning rate of AdamW (one cycle).
        seed: Seed of weights, order and augmentation.
        device: Where to train; the result stays there.
        bf16: Train under bfloat16 autocast (pays on CPUs with AVX512-BF16 or AMX and on GPUs).

    Returns:
        The network in `eval` mode, its parameters frozen.

    References:
        Gidaris et al. 2018, Unsupervised Representation Learning by Predicting Image Rotations, arXiv:1803.07728.
    """
    lessons = _Lessons(data, classes, batch, seed, torch.device(device), steps)
    net = fresh(lessons.shape, lessons.classes, width, seed, lessons.device)
    _train(net, lessons, steps, rate, bf16)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def predict(net: Classifier, x: Tensor, chunk: int = 1000) -> Tensor:
    """The likeliest class of each image: (N, C, H, W) in [-1, 1] to (N,) on the CPU."""
    device = net.head.weight.device
    parts = [net(part.to(device, memory_format=torch.channels_last)).argmax(1).cpu() for part in x.split(chunk)]
    return torch.cat(parts)
