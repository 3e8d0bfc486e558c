"""Semi-supervised training of the classifier: few labelled images and many without a label."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.dataset import partly_labelled
from sfumato.modalities.image.classifier import (
    LABEL_SMOOTHING,
    WEIGHT_DECAY,
    Classifier,
    LabelledImages,
    endless_batches,
    fit_classifier,
    new_classifier,
    one_cycle,
)
from sfumato.modalities.image.label_propagation import (
    balance_classes,
    downsample,
    handcrafted_features,
    project_pca,
    propagate_labels,
)
from sfumato.types import batch_limit

PSEUDO_LABEL_ROUNDS = 3  # rounds of training, each with new propagated labels
MAX_UNLABELLED = 30_000  # unlabelled images used, at most
SEMI_BATCH_SIZE = 256  # images per step, labelled and unlabelled
UNLABELLED_RATIO = 3  # unlabelled images per labelled one in a batch
EMA_DECAY = 0.995  # per step, of the teacher's weights
STATISTICS_DECAY = 0.98  # per step, of the running class distribution and confidence
MAX_SHIFT = 3 / 28  # shift of unlabelled images, share of the side; labelled ones are shifted two thirds as far
CUTOUT_SIDE = 0.5  # side of the square that cutout removes, share of the image's side
BRIGHTNESS_STD = 0.3  # standard deviation of the logarithm of the brightness factor
TARGET_WEIGHT = 0.5  # exponent of the propagated labels, against 1 of the teacher's prediction
MIN_TARGET = 1e-3  # probability that the propagated labels leave to any class, at least
ROUND_WARMUP = 0.1  # share of a round's steps in which the learning rate rises
TEACHER_BATCH_SIZE = 1_000  # images per forward pass of the teacher


def unlabelled_per_epoch(steps: int, batch_size: int = SEMI_BATCH_SIZE) -> int:
    """Number of unlabelled images that `steps` steps see once, at most `MAX_UNLABELLED`; more are not needed."""
    return min(MAX_UNLABELLED, max(1, steps) * (batch_size - _labelled_batch_size(batch_size)))


def _labelled_batch_size(batch_size: int) -> int:
    """Labelled images of a batch."""
    return max(1, batch_size // (1 + UNLABELLED_RATIO))


def random_shift(x: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image (B, C, H, W) by up to `max_shift` pixels each way, replicating the border."""
    count, _, height, width = x.shape
    down, right = torch.randint(-max_shift, max_shift + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + right).clamp(0, width - 1)  # (B, W)
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, brightness and cutout (DeVries and Taylor 2017, arXiv:1708.04552) of images (B, C, H, W) in [-1, 1]."""
    count, _, height, width = x.shape
    x = random_shift(x, shift_range(x), generator)
    x = x + torch.randn(count, 1, 1, 1, generator=generator).mul(BRIGHTNESS_STD).expm1() * (x + 1)
    rows, columns = (
        ((torch.arange(side) + 0.5) / side - torch.rand(count, 1, generator=generator)).abs() < CUTOUT_SIDE / 2
        for side in (height, width)
    )  # (B, H), (B, W)
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)
    return torch.where(hole, x.mean((1, 2, 3), keepdim=True), x).clamp(-1, 1)


def shift_range(x: Tensor) -> int:
    """Largest shift of images (B, C, H, W), in pixels."""
    return max(1, round(MAX_SHIFT * min(x.shape[-2:])))


@dataclass
class PseudoLabels:
    r"""Pseudo-labels of unlabelled images, with soft weights by confidence.

    The prediction is $p \propto p_{teacher} q^{0.5}$ with q the propagated labels. Distribution alignment scales it by
    prior / running mean of p, as classes are taken to be as frequent as among the labelled images. The weight is a
    Gaussian of how far the confidence lies below its running mean.

    Args:
        prior: Share of each class (K,).
        target: Propagated labels: class probabilities (N, K).
        targets_only: Whether to ignore the teacher, as in the first round.

    References:
        Berthelot et al. 2020, ReMixMatch, arXiv:1911.09785, section 3.1; Chen et al. 2023, SoftMatch, arXiv:2301.10921,
        eq. 6 to 8.
    """

    prior: Tensor
    target: Tensor
    targets_only: bool

    def __post_init__(self) -> None:
        self.class_average = self.prior.clone()
        confidence = self.target.max(1).values
        self.mean, self.variance = float(confidence.mean()), float(confidence.var(unbiased=False))

    def __call__(self, index: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class numbers (B,) and weights (B,) of the images `index` (B,), given the teacher's logits (B, K)."""
        probs = self.target[index]
        if logits is not None:
            joint = (logits.log_softmax(1) + TARGET_WEIGHT * probs.clamp(min=MIN_TARGET).log()).softmax(1)
            self.class_average = STATISTICS_DECAY * self.class_average + (1 - STATISTICS_DECAY) * joint.mean(0)
            probs = joint * (self.prior / self.class_average)
            probs = probs / probs.sum(1, keepdim=True)
        confidence, label = probs.max(1)
        mean, variance = float(confidence.mean()), float(confidence.var(unbiased=False))
        self.mean = STATISTICS_DECAY * self.mean + (1 - STATISTICS_DECAY) * mean
        self.variance = STATISTICS_DECAY * self.variance + (1 - STATISTICS_DECAY) * variance
        weight = torch.exp(-2 * (confidence - self.mean).clamp(max=0).square() / max(self.variance, 1e-6))
        return label, weight


class _Student:
    """A network in training, the average of its weights (the teacher), and their images.

    Args:
        data: Images, of which some have a label.
        classes: Number of classes.
        batch_size: Images per step, a quarter of them labelled.
        width: Channels of the stem.
        seed: Seed of the weights, the order and the augmentation.
        device: Where to compute.
        bf16: Whether to use bfloat16 autocast.
        max_unlabelled: Unlabelled images used, at most.
    """

    def __init__(
        self,
        data: LabelledImages,
        classes: int,
        batch_size: int,
        width: int,
        seed: int,
        device: torch.device,
        bf16: bool,
        max_unlabelled: int,
    ) -> None:
        assert data.labels is not None
        self.data, self.device, self.bf16 = data, device, bf16
        self.generator = torch.Generator().manual_seed(seed)
        labelled, unlabelled = (torch.from_numpy(np.flatnonzero(mask)) for mask in (data.labels >= 0, data.labels < 0))
        unlabelled = unlabelled[torch.randperm(len(unlabelled), generator=self.generator)[:max_unlabelled]]
        self.index, self.n_labelled = torch.cat([labelled, unlabelled]), len(labelled)  # labelled images come first
        self.labels = torch.from_numpy(data.labels[labelled.numpy()])
        share = _labelled_batch_size(batch_size)
        self.labelled_order = endless_batches(len(labelled), share, self.generator)
        self.unlabelled_order = endless_batches(len(unlabelled), batch_size - share, self.generator)
        self.prior = torch.bincount(self.labels, minlength=classes).float().div(len(labelled)).clamp(min=1e-6)
        self.shape = tuple(data.batch(torch.arange(1)).data.shape[1:])
        self.net = new_classifier(self.shape, classes, width, seed, device)
        self.teacher = copy.deepcopy(self.net).eval().requires_grad_(False)
        parts = self.index.split(batch_limit(self.shape, TEACHER_BATCH_SIZE))
        self.target = self.propagate(handcrafted_features(torch.cat([downsample(data.batch(i).data) for i in parts])))

    def propagate(self, features: Tensor) -> Tensor:
        """Class probabilities (N, K) by label propagation over features (N, D)."""
        return propagate_labels(features, torch.arange(self.n_labelled), self.labels, self.prior)

    def to_device(self, x: Tensor) -> Tensor:
        """Images on the device, channels last."""
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def update_targets(self) -> None:
        """New targets: the root of (teacher x label propagation over its features x last targets), class-balanced."""
        parts: list[Tensor] = []
        for index in self.index.split(batch_limit(self.shape, TEACHER_BATCH_SIZE)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                parts.append(self.teacher.features(self.to_device(self.data.batch(index).data)).float().cpu())
        features = torch.cat(parts)
        head = self.teacher.head
        probs = balance_classes(F.linear(features, head.weight.cpu(), head.bias.cpu()).softmax(1), self.prior)
        self.target = balance_classes((probs * self.propagate(project_pca(features)) * self.target).sqrt(), self.prior)

    def fit(self, steps: int, learning_rate: float, pseudo_labels: PseudoLabels) -> None:
        """Train for one round."""
        optimizer = torch.optim.AdamW(self.net.parameters(), learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = one_cycle(optimizer, learning_rate, steps, ROUND_WARMUP)
        self.net.train()
        for step in range(steps):
            loss = self._loss(pseudo_labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            decay = min(EMA_DECAY, (1 + step) / (10 + step)) if pseudo_labels.targets_only else EMA_DECAY
            _update_ema(self.teacher, self.net, decay)

    def _loss(self, pseudo_labels: PseudoLabels) -> Tensor:
        """Loss of the next batch: slightly shifted labelled images, strongly augmented unlabelled ones."""
        labelled, unlabelled = next(self.labelled_order), next(self.unlabelled_order) + self.n_labelled
        x = self.data.batch(self.index[labelled]).data
        x = random_shift(x, max(1, 2 * shift_range(x) // 3), self.generator)
        u = self.data.batch(self.index[unlabelled]).data
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                teacher_logits = None if pseudo_labels.targets_only else self.teacher(self.to_device(u)).float().cpu()
            logits = self.net(self.to_device(torch.cat([x, augment(u, self.generator)]))).float()
        label, weight = (v.to(self.device) for v in pseudo_labels(unlabelled, teacher_logits))
        y = self.labels[labelled].to(self.device)
        supervised = F.cross_entropy(logits[: len(x)], y, label_smoothing=LABEL_SMOOTHING)
        return supervised + (weight * F.cross_entropy(logits[len(x) :], label, reduction="none")).mean()


def fit_semi_supervised(
    data: LabelledImages,
    classes: int,
    *,
    steps: int = 2_000,
    batch_size: int = SEMI_BATCH_SIZE,
    width: int = 24,
    learning_rate: float = 4e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    max_unlabelled: int | None = None,
) -> Classifier:
    r"""Train a classifier as `fit_classifier` does, but on data of which most have no label.

    First, label propagation along a graph of similar images gives the targets. Then the network trains in rounds: it
    learns to predict for an augmented image the pseudo-label of the original, from an EMA teacher and the targets.
    After each round, labels are propagated again over the teacher's features.
    $L = H(y, p(x)) + w H(\hat y, p(\tilde x))$; see `PseudoLabels` for ŷ and w.

    Args:
        data: Images in [-1, 1]; labels are `UNKNOWN` where there is none.
        classes: Number of classes.
        steps: Optimizer steps.
        batch_size: Images per step, a quarter of them labelled; reduced for large images to bound the memory.
        width: Channels of the stem.
        learning_rate: Peak learning rate of AdamW (one-cycle schedule per round).
        seed: Seed of the weights, the order and the augmentation.
        device: Device of the training and of the result.
        bf16: Use bfloat16 autocast.
        max_unlabelled: Unlabelled images used, at most; default those that the steps see once.

    Returns:
        The teacher in `eval` mode, its parameters frozen.

    References:
        Sohn et al. 2020, FixMatch, arXiv:2001.07685, eq. 3 and 4; Iscen et al. 2019, Label Propagation for Deep
        Semi-supervised Learning, arXiv:1904.04717.
    """
    if classes < 2 or not partly_labelled(data.labels):
        return fit_classifier(
            data, classes, steps=steps, width=width, learning_rate=learning_rate, seed=seed, device=device, bf16=bf16
        )
    batch_size = min(batch_size, max(2, batch_limit(data.batch(torch.arange(1)).data.shape[1:], batch_size)))
    max_unlabelled = max_unlabelled or unlabelled_per_epoch(steps, batch_size)
    student = _Student(data, classes, batch_size, width, seed, torch.device(device), bf16, max_unlabelled)
    for k in range(PSEUDO_LABEL_ROUNDS):
        if k:
            student.update_targets()
        count = steps * (k + 1) // PSEUDO_LABEL_ROUNDS - steps * k // PSEUDO_LABEL_ROUNDS
        student.fit(count, learning_rate, PseudoLabels(student.prior, student.target, targets_only=not k))
    return student.teacher


@torch.no_grad()
def _update_ema(average: Classifier, net: Classifier, decay: float) -> None:
    """Exponential moving average of weights and batch statistics; counters are copied."""
    for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)
