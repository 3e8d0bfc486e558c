"""A classifier from few labels and many images without one."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.nn.classifier import Classifier, Images, endless, fit_classifier, fresh, one_cycle
from sfumato.nn.spread import balanced, plain_features, pooled, shortened, spread
from sfumato.types import UNKNOWN, at_once

ROUNDS = 3  # of learning, each with new targets
MOST = 30_000  # images without label that are learned from, at most
BATCH = 256  # images a step
AVERAGE = 0.995  # of the weights that say what an image shows, after the first steps
MEMORY = 0.98  # of the shares of classes and of the confidence seen
SHIFT = 3 / 28  # of a side: how far disturbed images are moved; labelled ones two thirds of it
CUT = 0.5  # side of the square that is cut out, of the image's
BRIGHT = 0.3  # spread of the logarithm of brightness
SHARE = 3  # images without label for each one with
TRUST = 0.5  # in targets from outside, beside what the average sees
CHUNK = 1_000  # images looked at at once


def partly_labelled(labels: np.ndarray | None) -> bool:
    """Whether some items have a label and some have none."""
    return labels is not None and bool((labels == UNKNOWN).any()) and bool((labels != UNKNOWN).any())


def seen_once(steps: int, batch: int = BATCH) -> int:
    """Images without label, `MOST` at most, that so many steps see once: to compare more would be wasted."""
    return min(MOST, max(1, steps) * (batch - _labelled(batch)))


def _labelled(batch: int) -> int:
    """Images of a batch that have a label."""
    return max(1, batch // (1 + SHARE))


def moved(x: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by up to `by` pixels each way; the border is repeated."""
    count, _, height, width = x.shape
    down, right = torch.randint(-by, by + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + right).clamp(0, width - 1)  # (B, W)
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) in [-1, 1] moved, made brighter or darker, and a square of it cut out."""
    count, _, height, width = x.shape
    x = moved(x, reach(x), generator)
    x = x + torch.randn(count, 1, 1, 1, generator=generator).mul(BRIGHT).expm1() * (x + 1)
    rows, columns = (
        ((torch.arange(side) + 0.5) / side - torch.rand(count, 1, generator=generator)).abs() < CUT / 2
        for side in (height, width)
    )  # (B, H), (B, W)
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)
    return torch.where(hole, x.mean((1, 2, 3), keepdim=True), x).clamp(-1, 1)


def reach(x: Tensor) -> int:
    """How many pixels disturbed images are moved at most."""
    return max(1, round(SHIFT * min(x.shape[-2:])))


@dataclass
class Guesses:
    """What images without a label show.

    Says what the average of the network sees, joined with targets from outside; classes are taken to be as frequent as
    among the labelled images. An image counts the less the less sure this is, against how sure it has been of late.

    Args:
        prior: Share of each class (K,).
        target: Chances of the classes from outside (N, K).
        alone: Whether the network is not asked yet.

    References:
        Berthelot et al. 2020, ReMixMatch, arXiv:1911.09785, section 3.1; Chen et al. 2023, SoftMatch, arXiv:2301.10921,
        eq. 6 to 8.
    """

    prior: Tensor
    target: Tensor
    alone: bool

    def __post_init__(self) -> None:
        self.seen = self.prior.clone()
        sure = self.target.max(1).values
        self.mean, self.variance = float(sure.mean()), float(sure.var(unbiased=False))

    def __call__(self, index: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class numbers (B,) and weights (B,) of images `index` (B,), where the average sees logits (B, K)."""
        chance = self.target[index]
        if logits is not None:
            joined = (logits.log_softmax(1) + TRUST * chance.clamp(min=1e-3).log()).softmax(1)
            self.seen = MEMORY * self.seen + (1 - MEMORY) * joined.mean(0)
            chance = joined * (self.prior / self.seen)
            chance = chance / chance.sum(1, keepdim=True)
        sure, label = chance.max(1)
        self.mean = MEMORY * self.mean + (1 - MEMORY) * float(sure.mean())
        self.variance = MEMORY * self.variance + (1 - MEMORY) * float(sure.var(unbiased=False))
        weight = torch.exp(-2 * (sure - self.mean).clamp(max=0).square() / max(self.variance, 1e-6))
        return label, weight


class _Pupil:
    """A network that learns, its average, and what both learn from.

    Args:
        data: Images, of which some have a label.
        classes: Number of classes.
        batch: Images a step, a quarter of them labelled.
        width: Channels of the stem.
        seed: Seed of weights, order and disturbances.
        device: Where to compute.
        bf16: Whether under bfloat16 autocast.
        most: Images without label that are learned from, at most.
    """

    def __init__(
        self, data: Images, classes: int, batch: int, width: int, seed: int, device: torch.device, bf16: bool, most: int
    ) -> None:
        assert data.labels is not None
        self.data, self.device, self.bf16 = data, device, bf16
        self.generator = torch.Generator().manual_seed(seed)
        known, others = (torch.from_numpy(np.flatnonzero(mask)) for mask in (data.labels >= 0, data.labels < 0))
        others = others[torch.randperm(len(others), generator=self.generator)[:most]]
        self.index, self.known = torch.cat([known, others]), len(known)
        self.label = torch.from_numpy(data.labels[known.numpy()])
        few = _labelled(batch)
        self.order = endless(len(known), few, self.generator)
        self.other_order = endless(len(others), batch - few, self.generator)
        self.prior = torch.bincount(self.label, minlength=classes).float().div(len(known)).clamp(min=1e-6)
        self.shape = shape = tuple(data.batch(torch.arange(1)).data.shape[1:])
        self.net = fresh(shape, classes, width, seed, device)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        small = torch.cat([pooled(data.batch(index).data) for index in self.index.split(at_once(shape, CHUNK))])
        self.target = self.spread(plain_features(small))

    def spread(self, features: Tensor) -> Tensor:
        """Chances of the classes (N, K) by likeness of features (N, D)."""
        return spread(features, torch.arange(self.known), self.label, self.prior)

    def put(self, x: Tensor) -> Tensor:
        """Images where they are computed."""
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def look(self) -> None:
        """Take new targets: what the average sees, what is alike in its eyes, and the targets before, joined."""
        parts: list[Tensor] = []
        for index in self.index.split(at_once(self.shape, CHUNK)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                parts.append(self.average.features(self.put(self.data.batch(index).data)).float().cpu())
        features = torch.cat(parts)
        head = self.average.head
        seen = balanced(F.linear(features, head.weight.cpu(), head.bias.cpu()).softmax(1), self.prior)
        self.target = balanced((seen * self.spread(shortened(features)) * self.target).sqrt(), self.prior)

    def learn(self, steps: int, rate: float, guesses: Guesses) -> None:
        """Take some steps towards guesses of one round."""
        optimizer = torch.optim.AdamW(self.net.parameters(), rate, weight_decay=0.02, fused=True)
        schedule = one_cycle(optimizer, rate, steps, rise=0.1)
        self.net.train()
        for step in range(steps):
            loss = self._loss(guesses)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            _follow(self.average, self.net, min(AVERAGE, (1 + step) / (10 + step)) if guesses.alone else AVERAGE)

    def _loss(self, guesses: Guesses) -> Tensor:
        """The loss of the next batch: labelled images, moved a little; and others, disturbed."""
        mine, theirs = next(self.order), next(self.other_order) + self.known
        x = self.data.batch(self.index[mine]).data
        x = moved(x, max(1, 2 * reach(x) // 3), self.generator)
        others = self.data.batch(self.index[theirs]).data
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                seen = None if guesses.alone else self.average(self.put(others)).float().cpu()
            logits = self.net(self.put(torch.cat([x, disturbed(others, self.generator)]))).float()
        label, weight = (v.to(self.device) for v in guesses(theirs, seen))
        known = F.cross_entropy(logits[: len(x)], self.label[mine].to(self.device), label_smoothing=0.05)
        return known + (weight * F.cross_entropy(logits[len(x) :], label, reduction="none")).mean()


def fit_semi(
    data: Images,
    classes: int,
    *,
    steps: int = 2_000,
    batch: int = BATCH,
    width: int = 24,
    rate: float = 4e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    most: int | None = None,
) -> Classifier:
    r"""As `fit_classifier`, from data of which some have a label and most have none.

    Labels are handed on along a graph of alike images first. Then the network learns, in rounds, to see in each
    disturbed image what its average sees in the image as it is; after each round labels are handed on anew, by what is
    alike in the network's eyes. $L = H(y, p(x)) + w H(\hat y, p(\tilde x))$; see `Guesses` for ŷ and w.

    Args:
        data: Images in [-1, 1]; labels are `UNKNOWN` where there is none.
        classes: Number of classes.
        steps: Optimizer steps.
        batch: Images a step, a quarter of them labelled; fewer of large ones, for memory.
        width: Channels of the stem.
        rate: Peak learning rate of AdamW (one cycle a round).
        seed: Seed of weights, order and disturbances.
        device: Where to train; the result stays there.
        bf16: Train under bfloat16 autocast.
        most: Images without label that are learned from at most, by default those that the steps see once.

    Returns:
        The average in `eval` mode, its parameters frozen.

    References:
        Sohn et al. 2020, FixMatch, arXiv:2001.07685, eq. 3 and 4; Iscen et al. 2019, Label Propagation for Deep
        Semi-supervised Learning, arXiv:1904.04717.
    """
    if classes < 2 or not partly_labelled(data.labels):
        kit = {"steps": steps, "width": width, "rate": rate, "seed": seed, "device": device, "bf16": bf16}
        return fit_classifier(data, classes, **kit)
    batch = min(batch, max(2, at_once(data.batch(torch.arange(1)).data.shape[1:], batch)))
    pupil = _Pupil(data, classes, batch, width, seed, torch.device(device), bf16, most or seen_once(steps, batch))
    for k in range(ROUNDS):
        if k:
            pupil.look()
        count = steps * (k + 1) // ROUNDS - steps * k // ROUNDS
        pupil.learn(count, rate, Guesses(pupil.prior, pupil.target, alone=not k))
    return pupil.average


@torch.no_grad()
def _follow(average: Classifier, net: Classifier, share: float) -> None:
    """Move the average's weights and statistics towards the network's, keeping a share of them."""
    for mine, theirs in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        mine.lerp_(theirs, 1 - share) if mine.is_floating_point() else mine.copy_(theirs)
