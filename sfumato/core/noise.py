"""Counted randomness: every draw has an address, so it is the same whatever the batch, the process or the device.

Sampling has one generator per (seed, item), training one per (seed, stage, step). All are on the CPU.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

_WORDS = 624  # the state of a Mersenne twister, stored as 64-bit words behind a header of three
_HEADER = 3


def addressed_generator(*address: int | str) -> Generator:
    """A CPU generator whose whole state is a hash of the address.

    `Generator.manual_seed` keeps 32 bits of its seed: of a hundred thousand items some would share their noise.
    """
    generator = Generator().manual_seed(0)
    plain = tuple(part if isinstance(part, str) else int(part) for part in address)  # an int of numpy prints otherwise
    digest = hashlib.shake_256(repr(plain).encode()).digest(4 * _WORDS)
    words = torch.frombuffer(bytearray(digest), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
    state = generator.get_state()
    assert state.numel() == 5056, "torch changed the layout of its CPU generator's state"
    state.view(torch.int64)[_HEADER : _HEADER + _WORDS] = words
    return generator.set_state(state)


def item_generator(seed: int, item: int, stream: str = "noise") -> Generator:
    """The generator of one item in sampling; another stream is independent of it."""
    return addressed_generator("item", seed, item, stream)


def step_generator(seed: int, stage: str, step: int) -> Generator:
    """The generator of one training step: it draws for the global batch, and each process takes its slice."""
    return addressed_generator("step", seed, stage, step)


class Noise:
    """Standard normal noise for a batch of items, each from its own generator; every call draws anew.

    Args:
        seed: The run's seed.
        items: Which items the batch holds, by number.
        shape: Shape of one item.
        stream: Another name draws independent noise.
    """

    def __init__(self, seed: int, items: Sequence[int], shape: Sequence[int], stream: str = "noise") -> None:
        self.shape = tuple(shape)
        self.generators = [item_generator(seed, item, stream) for item in items]

    def __call__(self) -> Tensor:
        """The next draw, (B, *shape), float32 on the CPU."""
        out = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(out, self.generators, strict=True):
            row.normal_(generator=generator)
        return out


def item_noise(seed: int, items: Sequence[int], shape: Sequence[int], stream: str = "noise") -> Tensor:
    """The first noise of each item, (B, *shape)."""
    return Noise(seed, items, shape, stream)()
