"""Items of certain kinds: drawn until there are enough, or, of a rare kind, made around what is known of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.modality.row import Kinds

ROUND = 500  # items drawn at once, at least
MOST_TRIED = 20  # items that are drawn for each one that is wanted, at most

Draw = Callable[[Sequence[int], Tensor | None], Tensor]


@dataclass
class Kept:
    """Items (N, ...) of one kind and their numbers, so far."""

    wanted: int
    numbers: list[int]
    items: list[Tensor]

    @property
    def lacking(self) -> int:
        """How many are still wanted."""
        return self.wanted - len(self.numbers)

    def add(self, numbers: Sequence[int], items: Tensor) -> None:
        """Take of these what is still wanted."""
        self.numbers += numbers[: self.lacking]
        self.items.append(items[: self.wanted - sum(map(len, self.items))])


def of_kinds(n: int, kinds: Kinds, draw: Draw) -> tuple[list[int], Tensor]:
    """As many items of each kind, n in all, and their numbers, in rising order.

    They are the first ones of their kind among all that the model makes. A kind that is too rare for that is made
    around what is known of it, if anything is; that is an approximation.

    Args:
        n: How many items in all; where they cannot be shared out evenly, the first kinds get one more.
        kinds: What is asked for.
        draw: (numbers, what is known of each or None) -> the items of these numbers.

    Raises:
        UserError: Of some kind there are not enough, and nothing is known of it.
    """
    count = len(kinds.names)
    kept = [Kept(n // count + (k < n % count), [], []) for k in range(count)]
    blank = kinds.known.flatten(1).isnan().all(1)
    tried, size, most = 0, max(n, ROUND), MOST_TRIED * max(n, ROUND)
    while tried < most and any(one.lacking for one in kept):
        if tried and all(hopeless(one, tried, most) and not blank[k] for k, one in enumerate(kept) if one.lacking):
            break
        sort_in(kept, kinds, range(tried, tried + size), draw(range(tried, tried + size), None))
        tried += size
    for k, one in enumerate(kept):
        tried = made_around(one, k, kinds, draw, tried)
    numbers = torch.tensor([number for one in kept for number in one.numbers], dtype=torch.int64)
    order = numbers.argsort()
    return [int(number) for number in numbers[order]], torch.cat([part for one in kept for part in one.items])[order]


def hopeless(one: Kept, tried: int, most: int) -> bool:
    """Whether, as it goes, there will not be enough."""
    return len(one.numbers) * most < one.wanted * tried


def sort_in(kept: Sequence[Kept], kinds: Kinds, numbers: Sequence[int], items: Tensor) -> None:
    """Give each kind those of the items (N, ...) that are of it."""
    found = kinds.sort(items)
    for k, one in enumerate(kept):
        mine = (found == k).nonzero().flatten()
        one.add([numbers[int(i)] for i in mine], items[mine])


def made_around(one: Kept, k: int, kinds: Kinds, draw: Draw, tried: int) -> int:
    """Make what is lacking of a kind around what is known of it; returns the next number that is free."""
    known, start = kinds.known[k], tried
    while one.lacking:
        if bool(known.isnan().all()) or tried - start >= MOST_TRIED * max(one.wanted, ROUND):
            found = f"only {len(one.numbers)} of {tried} rows are of the kind {kinds.names[k]}"
            raise UserError(f"{found}; ask for fewer, or for less", code=1)
        numbers = range(tried, tried + one.lacking)
        items = draw(numbers, known)
        good = (kinds.sort(items) == k).nonzero().flatten()
        one.add([numbers[int(i)] for i in good], items[good])
        tried += len(numbers)
    return tried
