"""What distances are measured on: a named function from images to vectors, and its statistics of a reference set."""

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

from sfumato.errors import UserError
from sfumato.metrics.distances import Moments, moments
from sfumato.metrics.inception import Inception
from sfumato.types import Batch, at_once

INCEPTION_ENV = "SFUMATO_INCEPTION"
CHUNK = 500  # images held at a time
KEPT = 10_000  # features of a reference set that are stored

N = TypeVar("N", bound=nn.Module)


class Images(Protocol):
    """What a report asks of a data set: labels (N,) or None, a content hash, batches in [-1, 1], and parts of it."""

    labels: np.ndarray | None

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, /) -> Batch: ...

    def subset(self, index: Tensor, /) -> Self: ...


class Extractor(Protocol):
    """Images (B, C, H, W) in [-1, 1] to vectors (B, D); `name` changes whenever the numbers would."""

    @property
    def name(self) -> str: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


class FeatureNet(Protocol):
    """A network with a penultimate layer, such as `sfumato.nn.Classifier`."""

    def features(self, x: Tensor, /) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class NamedExtractor:
    """A function with a name, and where it computes."""

    name: str
    function: Callable[[Tensor], Tensor]
    device: str | torch.device = "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to float32 vectors (B, D) on the CPU."""
        with torch.no_grad():
            return self.function(x.to(self.device)).flatten(1).float().cpu()


def weights_hash(state: dict[str, Tensor]) -> str:
    """Eight hexadecimal digits that name a set of weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def _write(state: dict[str, Tensor], path: Path) -> None:
    """Appears whole or not at all; a cache that cannot be written is no error."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, draft)
        draft.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Tensor] | None:
    """What was kept; None where there is nothing, or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def cached_network(path: Path | None, build: Callable[[], N], train: Callable[[], N]) -> N:
    """A trained network: its weights from `path` when they are there, whole and fit, else trained and written to it.

    Args:
        path: Safetensors file, or None not to cache.
        build: Makes the network untrained.
        train: Makes the network trained.
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
    """The penultimate layer of a network, which `train` returns (train it on the training split alone).

    The extractor's name ends in a hash of the weights: numbers of two different networks are not comparable.
    """
    net = train()
    return NamedExtractor(f"{name}-{weights_hash(net.state_dict())}", net.features, device)


def find_inception(cache: Path | None = None) -> Path | None:
    """The weights of the FID Inception: the file named by SFUMATO_INCEPTION, or `*inception*.safetensors` in `cache`.

    Raises:
        UserError: The variable names a file that is not there.
    """
    named = os.environ.get(INCEPTION_ENV)
    if named:
        if not Path(named).is_file():
            raise UserError(f"{INCEPTION_ENV}: no file {named}; unset it to use other features")
        return Path(named)
    return next(iter(sorted(cache.glob("*inception*.safetensors"))), None) if cache is not None else None


def inception_extractor(path: Path, device: str | torch.device = "cpu") -> NamedExtractor:
    """The 2,048 pooled features of the Inception-v3 that FIDs are quoted on.

    Args:
        path: Weights as safetensors, with the keys of `pt_inception-2015-12-05-6726825d.pth`.
        device: Where to compute.

    Raises:
        UserError: The file holds other weights.
    """
    net = Inception()
    missing, unknown = net.load_state_dict(
        {k: v for k, v in load_file(path).items() if not k.startswith("AuxLogits.")}, strict=False
    )
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unknown:
        raise UserError(f"{path}: not the weights of the FID Inception ({(missing + unknown)[0]} does not match)", 1)
    net = net.to(device).eval().requires_grad_(False)
    return NamedExtractor(f"inception-{weights_hash(net.state_dict())}", net, device)


def pick(count: int, n: int, seed: int = 0) -> Tensor:
    """`n` of `count` indices, or all of them, in a random order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]


def image_parts(data: Images, index: Tensor | None = None) -> Iterator[Tensor]:
    """The images (b, C, H, W) of a data set, or of some of its items, a bounded number at a time."""
    index = torch.arange(len(data)) if index is None else index
    shape = data.batch(index[:1]).data.shape[1:]
    for part in index.split(at_once(shape, CHUNK)):
        yield data.batch(part).data


def extract(extractor: Extractor, data: Images, index: Tensor | None = None) -> Tensor:
    """Features (N, D) of a data set, or of some of its items."""
    return torch.cat([extractor(x) for x in image_parts(data, index)])


@dataclass
class Reference:
    """What a report needs of a real set: moments over all of it and the features (n, D) of a fixed random part."""

    moments: Moments
    sample: Tensor

    def state(self) -> dict[str, Tensor]:
        """As tensors to be stored."""
        count = torch.tensor(self.moments.count)
        return {"mean": self.moments.mean, "cov": self.moments.cov, "count": count, "sample": self.sample}


def reference(data: Images, extractor: Extractor, cache: Path | None = None, most: int = KEPT) -> Reference:
    """Feature statistics of a real set, from `cache` when they were taken before.

    Args:
        data: The real images.
        extractor: The named extractor.
        cache: Folder of safetensors files keyed by the set's fingerprint and the extractor's name; None not to cache.
        most: Features kept for the distances that need neighbours.
    """
    key = hashlib.sha256(f"{data.fingerprint} {extractor.name} {most}".encode()).hexdigest()[:24]
    path = cache / f"features-{key}.safetensors" if cache is not None else None
    state = None if path is None else _read(path)
    if state is not None:
        return Reference(Moments(state["mean"], state["cov"], int(state["count"])), state["sample"])
    order = pick(len(data), len(data))
    kept: list[Tensor] = []

    def stream() -> Iterator[Tensor]:
        done = 0
        for x in image_parts(data, order):
            features = extractor(x)
            kept.append(features[: max(0, most - done)])
            done += len(x)
            yield features

    taken = Reference(moments(stream()), torch.cat(kept))
    if path is not None:
        _write(taken.state(), path)
    return taken
