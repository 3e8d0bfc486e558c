"""Labels handed on from few images to all others, along a graph of which images are alike."""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

NEIGHBOURS = 10  # of each image in the graph
COMPARED = 1_000  # images compared with all others at once
POWER = 3  # of the likeness of two neighbours
REACH = 0.99  # share that an image takes from its neighbours in a round
ROUNDS = 60
SIDE = 28  # pixels a side that features are taken at, at most
NUMBERS = 64  # of each kind of feature that are kept
ANGLES = 8  # directions that gradients are counted in
CELLS = 7  # of gradients along a side


def pooled(x: Tensor) -> Tensor:
    """Images (N, C, H, W) made as small as features need them; smaller ones stay as they are."""
    return F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[-2]), min(SIDE, x.shape[-1])))


def plain_features(x: Tensor) -> Tensor:
    """What untrained eyes see in images (N, C, H, W): their pixels and the directions of their gradients: (N, D)."""
    x = pooled(x)
    directions = torch.cat([gradients(part) for part in x.split(COMPARED)])
    return torch.cat([shortened(x.flatten(1)), shortened(directions)], 1)


def gradients(x: Tensor) -> Tensor:
    """How long gradients are in each direction and cell of images (N, C, H, W): (N, D).

    References:
        Dalal and Triggs 2005, Histograms of Oriented Gradients for Human Detection.
    """
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]
    right, down = (
        grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2],
        grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1],
    )
    angle = torch.atan2(down, right).remainder(math.pi) * (ANGLES / math.pi)  # (N, h, w)
    length = torch.hypot(right, down)
    centres = torch.arange(ANGLES)[:, None, None]
    apart = (angle[:, None] - centres).abs()
    share = (1 - torch.minimum(apart, ANGLES - apart)).clamp(min=0)  # each falls to the two directions next to it
    size = x.shape[-2:]
    cells = [max(1, side // CELLS) for side in size]
    counted = F.avg_pool2d(share * length[:, None], [min(2 * c, s) for c, s in zip(cells, size, strict=True)], cells)
    return (counted / (counted.norm(dim=1, keepdim=True) + 0.05)).flatten(1)


def shortened(x: Tensor, numbers: int = NUMBERS, most: int = 8_000) -> Tensor:
    """Vectors (N, D) on their `numbers` main axes (of the first `most`), so that the first has unit deviation."""
    x = x - x.mean(0)
    axes = torch.linalg.svd(x[:most], full_matrices=False)[2][:numbers]
    x = x @ axes.T
    return x / x[:, 0].std().clamp(min=1e-6)


def nearest(unit: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Likeness and numbers (B, k) of the nearest others of `COMPARED` of the unit vectors (N, D), from `first` on."""
    part = unit[first : first + COMPARED] @ unit.T
    own = torch.arange(len(part))
    part[own, own + first] = -1
    values, index = part.topk(min(NEIGHBOURS, len(unit) - 1), dim=1)
    return values, index


def comparing(count: int) -> float:
    """Seconds in which each of so many images is compared with every other, judged by a part of it."""
    unit = F.normalize(torch.randn(count, 2 * NUMBERS, generator=torch.Generator().manual_seed(0)), dim=1)
    began = time.perf_counter()
    nearest(unit, 0)
    return (time.perf_counter() - began) * max(1.0, count / COMPARED)


def alike(features: Tensor) -> sparse.csr_array:
    """A graph of images by features (N, D): sparse (N, N), symmetric and normalised, S = D^-1/2 W D^-1/2."""
    unit = F.normalize(features, dim=1)
    parts = [nearest(unit, first) for first in range(0, len(unit), COMPARED)]
    weight, index = (torch.cat(part) for part in zip(*parts, strict=True))
    k = weight.shape[1]
    rows = np.repeat(np.arange(len(unit)), k)
    weights = weight.clamp(min=1e-3).double().pow(POWER).flatten().numpy()
    graph = sparse.csr_array((weights, (rows, index.flatten().numpy())), (len(unit), len(unit)))
    graph = graph.maximum(graph.T)
    scale = sparse.diags_array(graph.sum(1) ** -0.5)
    return (scale @ graph @ scale).tocsr()


def spread(features: Tensor, known: Tensor, label: Tensor, prior: Tensor) -> Tensor:
    """How likely each image is of each class (N, K), from those whose class is known.

    Args:
        features: What images are compared by (N, D).
        known: Which images have a label (M,).
        label: Their class numbers (M,).
        prior: Share of each class (K,).

    References:
        Zhou et al. 2004, Learning with Local and Global Consistency, eq. 4; classes are balanced as in Iscen et al.
        2019, Label Propagation for Deep Semi-supervised Learning, arXiv:1904.04717.
    """
    graph = alike(features)
    start = np.zeros((len(features), len(prior)))
    start[known, label] = 1
    z = start
    for _ in range(ROUNDS):
        z = REACH * (graph @ z) + (1 - REACH) * start
    return balanced(torch.from_numpy(z + 1e-9 * z.max()).float(), prior)


def balanced(chance: Tensor, prior: Tensor, rounds: int = 20) -> Tensor:
    """Chances (N, K) scaled so that each row sums to 1 and the classes have the shares `prior` (K,)."""
    for _ in range(rounds):
        chance = chance * (prior / chance.mean(0).clamp(min=1e-12))
        chance = chance / chance.sum(1, keepdim=True).clamp(min=1e-12)
    return chance
