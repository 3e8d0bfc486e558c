"""Features that distances are measured on: named extractors, and their cached statistics of a reference set."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.metrics.distances import Moments, moments
from sfumato.types import Batch, batch_limit

FEATURE_BATCH = 500  # items whose features are computed at once
STORED_FEATURES = 10_000  # feature vectors of a reference set that are stored

N = TypeVar("N", bound=nn.Module)


class ItemSet(Protocol):
    """The part of a data set that metrics use: labels (N,) or None, sha256 of the content, batches and subsets."""

    labels: np.ndarray | None

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, /) -> Batch: ...

    def subset(self, index: Tensor, /) -> Self: ...


class Extractor(Protocol):
    """Items x (B, ...) -> feature vectors (B, D); `name` identifies the function and is the key of cached features."""

    @property
    def name(self) -> str: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


class FeatureNet(Protocol):
    """A network with features, such as the penultimate layer of a classifier."""

    def features(self, x: Tensor, /) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class NamedExtractor:
    """An extractor from a function.

    Args:
        name: Its name.
        function: Items (B, ...) -> features (B, ...).
        device: Device that the function computes on.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    device: str | torch.device = "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """Float32 vectors (B, D), on the CPU, of items x (B, ...)."""
        with torch.no_grad():
            return self.function(x.to(self.device)).flatten(1).float().cpu()


def weights_hash(state: dict[str, Tensor]) -> str:
    """Eight hexadecimal digits of a sha256 over names and values of weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def _write(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, completely or not at all; a cache that cannot be written is no error."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, draft)
        draft.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def cached_network(path: Path | None, build: Callable[[], N], train: Callable[[], N]) -> N:
    """A trained network, frozen: with the weights in `path` if they are complete and fit, else trained and saved there.

    Args:
        path: Safetensors file; None for no cache.
        build: Returns the untrained network.
        train: Returns the trained network.
    """
    state = None if path is None else _read(path)
    if state is not None:
        net = build()
        if {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in state.items()}:
            net.load_state_dict(state)
            return net.eval().requires_grad_(False)
    net = train()
    if path is not None:
        _write(net.state_dict(), path)
    return net


def classifier_extractor(
    train: Callable[[], FeatureNet], name: str = "classifier", device: str | torch.device = "cpu"
) -> NamedExtractor:
    """An extractor of a network's penultimate features.

    Its name ends with a hash of the weights: features of two networks are not comparable.

    Args:
        train: Returns the network, trained on the training part only.
        name: First part of the name.
        device: Device of the network.
    """
    net = train()
    return NamedExtractor(f"{name}-{weights_hash(net.state_dict())}", net.features, device)


def random_indices(count: int, n: int, seed: int = 0) -> Tensor:
    """`n` of `count` indices (all if there are fewer), in a random order that depends only on the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]


def item_batches(data: ItemSet, index: Tensor | None = None) -> Iterator[Tensor]:
    """The items (b, ...) of a data set, or those at `index` (N,), in batches of bounded size."""
    index = torch.arange(len(data)) if index is None else index
    shape = data.batch(index[:1]).data.shape[1:]
    for part in index.split(batch_limit(shape, FEATURE_BATCH)):
        yield data.batch(part).data


def extract(extractor: Extractor, data: ItemSet, index: Tensor | None = None) -> Tensor:
    """Features (N, D) of a data set, or of its items at `index` (N,)."""
    return torch.cat([extractor(x) for x in item_batches(data, index)])


@dataclass
class Reference:
    """Feature statistics of a real set: moments over all items, and features (n, D) of a fixed random sample."""

    moments: Moments
    sample: Tensor

    def state(self) -> dict[str, Tensor]:
        """The statistics as named tensors, to be saved."""
        count = torch.tensor(self.moments.count)
        return {"mean": self.moments.mean, "cov": self.moments.cov, "count": count, "sample": self.sample}


def reference(
    data: ItemSet, extractor: Extractor, cache: Path | None = None, max_sample: int = STORED_FEATURES
) -> Reference:
    """Feature statistics of a real set, cached.

    Args:
        data: The real items.
        extractor: The extractor.
        cache: Folder of safetensors files, keyed by fingerprint and extractor name; None for no cache.
        max_sample: Maximum size of the sample, used by distances between neighbours.
    """
    key = hashlib.sha256(f"{data.fingerprint} {extractor.name} {max_sample}".encode()).hexdigest()[:24]
    path = cache / f"features-{key}.safetensors" if cache is not None else None
    state = None if path is None else _read(path)
    if state is not None:
        return Reference(Moments(state["mean"], state["cov"], int(state["count"])), state["sample"])
    order = random_indices(len(data), len(data))
    kept: list[Tensor] = []

    def stream() -> Iterator[Tensor]:
        done = 0
        for x in item_batches(data, order):
            features = extractor(x)
            kept.append(features[: max(0, max_sample - done)])
            done += len(x)
            yield features

    taken = Reference(moments(stream()), torch.cat(kept))
    if path is not None:
        _write(taken.state(), path)
    return taken
