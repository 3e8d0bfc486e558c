"""Label propagation: from few labelled images to all others along a graph of similar images."""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

GRAPH_NEIGHBOURS = 10  # nearest neighbours of each image in the graph
SEARCH_CHUNK = 1_000  # images compared with all others at a time
AFFINITY_POWER = 3  # exponent γ of the cosine similarity of two neighbours
PROPAGATION_ALPHA = 0.99  # α, the share that an image takes from its neighbours per iteration
PROPAGATION_STEPS = 60  # iterations of label propagation
MAX_FEATURE_SIDE = 28  # largest side of the images that handcrafted features are computed on, pixels
PCA_DIM = 64  # principal components per kind of feature
PCA_SAMPLE = 8_000  # vectors that the principal axes are computed from, at most
GRADIENT_ANGLES = 8  # bins of a histogram of gradient directions
GRADIENT_CELLS = 7  # histograms along a side
BALANCE_ITERATIONS = 20  # alternating scalings of classes and items


def downsample(x: Tensor) -> Tensor:
    """Images (N, C, H, W) averaged down to `MAX_FEATURE_SIDE`; smaller ones stay as they are."""
    return F.adaptive_avg_pool2d(x, (min(MAX_FEATURE_SIDE, x.shape[-2]), min(MAX_FEATURE_SIDE, x.shape[-1])))


def handcrafted_features(x: Tensor) -> Tensor:
    """Principal components of the pixels and of the gradient histograms of images (N, C, H, W): (N, D)."""
    x = downsample(x)
    histograms = torch.cat([gradient_histograms(part) for part in x.split(SEARCH_CHUNK)])
    return torch.cat([project_pca(x.flatten(1)), project_pca(histograms)], 1)


def gradient_histograms(x: Tensor) -> Tensor:
    """Histograms of oriented gradients of images (N, C, H, W), normalised over the angles of a cell: (N, D).

    References:
        Dalal and Triggs 2005, Histograms of Oriented Gradients for Human Detection.
    """
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]
    dx, dy = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    angle = torch.atan2(dy, dx).remainder(math.pi) * (GRADIENT_ANGLES / math.pi)  # (N, h, w), in bins
    magnitude = torch.hypot(dx, dy)
    centres = torch.arange(GRADIENT_ANGLES)[:, None, None]
    distance = (angle[:, None] - centres).abs()
    vote = (1 - torch.minimum(distance, GRADIENT_ANGLES - distance)).clamp(min=0)  # split between two adjacent bins
    size = x.shape[-2:]
    cells = [max(1, side // GRADIENT_CELLS) for side in size]
    windows = [min(2 * c, s) for c, s in zip(cells, size, strict=True)]
    histograms = F.avg_pool2d(vote * magnitude[:, None], windows, cells)
    return (histograms / (histograms.norm(dim=1, keepdim=True) + 0.05)).flatten(1)


def project_pca(x: Tensor, dim: int = PCA_DIM) -> Tensor:
    """First `dim` principal components of vectors (N, D), scaled so that the first has unit standard deviation."""
    x = x - x.mean(0)
    axes = torch.linalg.svd(x[:PCA_SAMPLE], full_matrices=False)[2][:dim]
    x = x @ axes.T
    return x / x[:, 0].std().clamp(min=1e-6)


def cosine_neighbours(unit: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices (B, k) of the nearest neighbours of `SEARCH_CHUNK` unit vectors from `first` on.

    Args:
        unit: Unit vectors (N, D).
        first: Index of the first query.
    """
    similarity = unit[first : first + SEARCH_CHUNK] @ unit.T
    query = torch.arange(len(similarity))
    similarity[query, query + first] = -1
    values, index = similarity.topk(min(GRAPH_NEIGHBOURS, len(unit) - 1), dim=1)
    return values, index


def comparison_seconds(count: int) -> float:
    """Estimated seconds of the neighbour search among `count` images, from a measured part of it."""
    unit = F.normalize(torch.randn(count, 2 * PCA_DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    start = time.perf_counter()
    cosine_neighbours(unit, 0)
    return (time.perf_counter() - start) * max(1.0, count / SEARCH_CHUNK)


def affinity_graph(features: Tensor) -> sparse.csr_array:
    """Normalised affinity S = D^-1/2 W D^-1/2 of features (N, D): sparse (N, N), symmetric."""
    unit = F.normalize(features, dim=1)
    parts = [cosine_neighbours(unit, first) for first in range(0, len(unit), SEARCH_CHUNK)]
    similarity, index = (torch.cat(part) for part in zip(*parts, strict=True))
    rows = np.repeat(np.arange(len(unit)), similarity.shape[1])
    weights = similarity.clamp(min=1e-3).double().pow(AFFINITY_POWER).flatten().numpy()
    graph = sparse.csr_array((weights, (rows, index.flatten().numpy())), (len(unit), len(unit)))
    graph = graph.maximum(graph.T)
    scale = sparse.diags_array(graph.sum(1) ** -0.5)
    return (scale @ graph @ scale).tocsr()


def propagate_labels(features: Tensor, labelled: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
    """Class probabilities (N, K) of all items: z <- α S z + (1 - α) y, then class balancing.

    Args:
        features: Features (N, D) that the graph is built on.
        labelled: Indices of the labelled items (M,).
        labels: Their class numbers (M,).
        prior: Share of each class (K,).

    References:
        Zhou et al. 2004, Learning with Local and Global Consistency, eq. 4; class balancing as in Iscen et al. 2019,
        Label Propagation for Deep Semi-supervised Learning, arXiv:1904.04717.
    """
    graph = affinity_graph(features)
    y = np.zeros((len(features), len(prior)))
    y[labelled, labels] = 1
    z = y
    for _ in range(PROPAGATION_STEPS):
        z = PROPAGATION_ALPHA * (graph @ z) + (1 - PROPAGATION_ALPHA) * y
    return balance_classes(torch.from_numpy(z + 1e-9 * z.max()).float(), prior)


def balance_classes(probs: Tensor, prior: Tensor) -> Tensor:
    """Scale probabilities (N, K) so that rows sum to 1 and the class means are `prior` (K,), by Sinkhorn iterations."""
    for _ in range(BALANCE_ITERATIONS):
        probs = probs * (prior / probs.mean(0).clamp(min=1e-12))
        probs = probs / probs.sum(1, keepdim=True).clamp(min=1e-12)
    return probs
