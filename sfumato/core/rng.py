"""Addressed randomness: the address of a draw alone decides its value, not the batch, the process or the device.

Sampling has one generator per (seed, item), training one per (seed, stage, step). All are on the CPU.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

_WORDS = 624  # words in the state of a Mersenne Twister; torch stores each in 64 bits
_HEADER = 3  # 64-bit words in front of them


def addressed_generator(*address: int | str) -> Generator:
    """A CPU generator whose whole state is a hash of the address.

    `Generator.manual_seed` keeps only 32 bits of its seed: among a hundred thousand items some would share noise.
    """
    generator = Generator().manual_seed(0)
    address = tuple(part if isinstance(part, str) else int(part) for part in address)  # numpy integers repr differently
    digest = hashlib.shake_256(repr(address).encode()).digest(4 * _WORDS)
    words = torch.frombuffer(bytearray(digest), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
    state = generator.get_state()
    assert state.numel() == 5056, "torch changed the layout of its CPU generator's state"
    state.view(torch.int64)[_HEADER : _HEADER + _WORDS] = words
    return generator.set_state(state)


def item_generator(seed: int, item: int, stream: str = "noise") -> Generator:
    """The generator of one item in sampling; different streams are independent."""
    return addressed_generator("item", seed, item, stream)


def step_generator(seed: int, stage: str, step: int) -> Generator:
    """The generator of one training step: it draws for the global batch, of which each process takes its slice."""
    return addressed_generator("step", seed, stage, step)


class Noise:
    """Standard normal noise for a batch of items, one generator per item; every call draws new noise.

    Args:
        seed: The run's seed.
        items: Numbers of the items in the batch.
        shape: Shape of one item.
        stream: Name of the stream; different streams are independent.
        mask: (B, N) for items of tokens (N, ...): only true positions get noise, the others zeros. An item's noise does
            not depend on how far it is padded.
    """

    def __init__(
        self,
        seed: int,
        items: Sequence[int],
        shape: Sequence[int],
        stream: str = "noise",
        mask: Tensor | None = None,
    ) -> None:
        self.shape, self.mask = tuple(shape), None if mask is None else mask.cpu()
        self.generators = [item_generator(seed, item, stream) for item in items]

    def __call__(self) -> Tensor:
        """The next noise, (B, *shape), float32 on the CPU."""
        noise = torch.zeros(len(self.generators), *self.shape)
        for i, generator in enumerate(self.generators):
            if self.mask is None:
                noise[i].normal_(generator=generator)
            else:
                count = int(self.mask[i].sum())
                noise[i, self.mask[i]] = torch.randn(count, *self.shape[1:], generator=generator)
        return noise


def item_noise(seed: int, items: Sequence[int], shape: Sequence[int], stream: str = "noise") -> Tensor:
    """The first noise of each item, (B, *shape)."""
    return Noise(seed, items, shape, stream)()
