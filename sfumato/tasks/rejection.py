"""Items of requested strata by rejection sampling; rare strata are inpainted around their fixed cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.modalities.base import Strata
from sfumato.types import Items

REJECTION_BATCH = 500  # minimum number of items per round
MAX_TRIES_PER_ROW = 20  # maximum number of items generated per requested one

Generate = Callable[[Sequence[int], Tensor | None], Items]


@dataclass
class Stratum:
    """The accepted items (N, ...) of a stratum and their numbers.

    Attributes:
        requested: Number of items to collect.
        numbers: Item numbers.
        items: Items, in parts.
    """

    requested: int
    numbers: list[int]
    items: list[Items]

    @property
    def missing(self) -> int:
        """Number of items still to collect."""
        return self.requested - len(self.numbers)

    def add(self, numbers: Sequence[int], items: Items) -> None:
        """Accept the first of these items (N, ...), as many as are missing."""
        self.items.append(items[: self.missing])
        self.numbers += numbers[: self.missing]


def fill_strata(n: int, strata: Strata, generate: Generate) -> tuple[list[int], Items]:
    """Numbers and items (n, ...) of all strata in equal shares, by increasing number.

    A stratum gets the first of its items among all that the model generates. If it is too rare for that and has fixed
    cells, the rest is inpainted around them; this is an approximation.

    Args:
        n: Number of items; the remainder goes to the first strata.
        strata: The requested groups.
        generate: (numbers, fixed values or None) -> items with these numbers.

    Raises:
        UserError: A stratum has too few items and no fixed cells.
    """
    count = len(strata.names)
    filled = [Stratum(n // count + (k < n % count), [], []) for k in range(count)]
    has_fixed = ~strata.fixed.flatten(1).isnan().all(1)
    tried, size, limit = 0, max(n, REJECTION_BATCH), MAX_TRIES_PER_ROW * max(n, REJECTION_BATCH)
    while tried < limit and any(stratum.missing for stratum in filled):
        unfilled = [k for k, stratum in enumerate(filled) if stratum.missing]
        if tried and all(is_rare(filled[k], tried, limit) and has_fixed[k] for k in unfilled):
            break
        numbers = range(tried, tried + size)
        assign_items(filled, strata, numbers, generate(numbers, None))
        tried += size
    for k, stratum in enumerate(filled):
        tried = inpaint_stratum(stratum, k, strata, generate, tried)
    accepted = torch.tensor([number for stratum in filled for number in stratum.numbers], dtype=torch.int64)
    order = accepted.argsort()
    items = Items.concat([part for stratum in filled for part in stratum.items]).select(order)
    return [int(number) for number in accepted[order]], items


def is_rare(stratum: Stratum, tried: int, limit: int) -> bool:
    """Whether the stratum would not be filled within `limit` items at the rate so far."""
    return len(stratum.numbers) * limit < stratum.requested * tried


def assign_items(filled: Sequence[Stratum], strata: Strata, numbers: Sequence[int], items: Items) -> None:
    """Add items (N, ...) to their strata."""
    assigned = strata.assign(items)
    for k, stratum in enumerate(filled):
        index = (assigned == k).nonzero().flatten()
        stratum.add([numbers[int(i)] for i in index], items.select(index))


def inpaint_stratum(stratum: Stratum, k: int, strata: Strata, generate: Generate, tried: int) -> int:
    """Inpaint the missing items of a stratum around its fixed cells; return the next unused item number."""
    fixed, start = strata.fixed[k], tried
    while stratum.missing:
        if bool(fixed.isnan().all()) or tried - start >= MAX_TRIES_PER_ROW * max(stratum.requested, REJECTION_BATCH):
            found = f"only {len(stratum.numbers)} of {tried} rows match {strata.names[k]}"
            raise UserError(f"{found}; lower -n or relax --where", code=1)
        numbers = range(tried, tried + stratum.missing)
        items = generate(numbers, fixed)
        index = (strata.assign(items) == k).nonzero().flatten()
        stratum.add([numbers[int(i)] for i in index], items.select(index))
        tried += len(numbers)
    return tried
