"""The conditioner of a model joins its conditions in one `Cond`; also the contract of a condition, and class labels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.conditioners.observed import ObservedConditions
from sfumato.errors import UserError
from sfumato.registry import nearest
from sfumato.types import Cond, Raw, RawValue

Values = TypeVar("Values", bound=RawValue)
C = TypeVar("C", bound="Condition[Any]")


class Condition(nn.Module, ABC, Generic[Values]):
    """One named condition: embeds its values, and has a learned null for items without a value.

    The null replaces the embedding row by row: where a value is not known, and in training where it is dropped. A
    subclass therefore gives `embed` and `null` the same parts; the lengths of their token sequences may differ.

    Args:
        dim: Length of its vector; 0 for none.
        token_dim: Length of one of its tokens; 0 for none. Tokens always have a mask.
        dropout: Share of training items for which the null replaces it.

    Attributes:
        kind: Its name in `CONDITIONS`.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int, token_dim: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.token_dim, self.dropout = dim, token_dim, dropout

    @abstractmethod
    def known(self, values: Values) -> Tensor:
        """Which of the values are known: (B,), boolean."""

    @abstractmethod
    def embed(self, values: Values) -> Cond:
        """The embedding of B values. A row without a value must be finite; `forward` replaces it by the null."""

    @abstractmethod
    def null(self, count: int) -> Cond:
        """The null condition of `count` items, with the fewest tokens that it needs."""

    def forward(self, values: Values, dropped: Tensor) -> Cond:
        """Embed B values; the null replaces those that are not known and those that `dropped` (B,) marks."""
        known = self.known(values)
        cond, null = self.embed(values), self.null(len(values))
        length = max(_token_count(cond), _token_count(null))
        kept = known & ~dropped.to(known.device)
        return _choose_rows(kept, _pad_tokens(cond, length), _pad_tokens(null, length))


def _token_count(cond: Cond) -> int:
    return 0 if cond.tokens is None else cond.tokens.shape[1]


def _choose_rows(rows: Tensor, cond: Cond, null: Cond) -> Cond:
    """The condition in the rows (B,) that are true, and the null, which has the same parts, in the others."""

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.where(rows.to(a.device).view(-1, *(1 for _ in a.shape[1:])), a, b)

    return Cond(choose(cond.vector, null.vector), choose(cond.tokens, null.tokens), choose(cond.mask, null.mask))


def _pad_tokens(cond: Cond, length: int) -> Cond:
    """Pad tokens (B, M, D) with zeros to M = length, and their mask (B, M) with false."""
    if cond.tokens is None or cond.mask is None or cond.tokens.shape[1] == length:
        return cond
    missing = length - cond.tokens.shape[1]
    return replace(cond, tokens=F.pad(cond.tokens, (0, 0, 0, missing)), mask=F.pad(cond.mask, (0, missing)))


class LabelCondition(Condition[Tensor]):
    """A learned embedding per class, and one for the null condition of classifier-free guidance.

    Args:
        names: Names of the K classes; row K of the table is the null.
        dim: Length of the embeddings.
        dropout: Share of training labels replaced by the null.

    References:
        Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598, algorithm 1.
    """

    kind = "label"

    def __init__(self, names: Sequence[str], dim: int = 128, dropout: float = 0.1) -> None:
        super().__init__(dim, 0, dropout)
        self.names = list(names)
        self.table = nn.Embedding(len(self.names) + 1, dim)

    @property
    def classes(self) -> int:
        """Number K of classes."""
        return len(self.names)

    def known(self, values: Tensor) -> Tensor:
        return values >= 0

    def embed(self, values: Tensor) -> Cond:
        """The embeddings of class numbers (B,)."""
        label = torch.where(self.known(values), values, self.classes)
        return Cond(vector=self.table(label.to(self.table.weight.device)))  # (B, dim)

    def null(self, count: int) -> Cond:
        # a lookup, for its gradient sums over items in their order, as that of the other rows does
        return Cond(vector=self.table(torch.full((count,), self.classes, device=self.table.weight.device)))


class Conditioner(nn.Module):
    """Maps what is known of items to the network's condition: `Raw` -> `Cond`.

    The vectors of the conditions are concatenated along their last axis, the tokens along the sequence, both in the
    order of the mapping. A condition that a batch does not name is null for all its items.

    Args:
        conditions: The conditions by name. An empty mapping makes an unconditional model, whose condition is always
            `Cond()`.

    Attributes:
        names: Names of the conditions, in order.
        conditions: The conditions, by `module_key` of their name.
        dim: Length of the joint vector; 0 if there is none.
        token_dim: Length of a token; 0 if there are none.
        observed: Conditions of training items, if there are several or numbers.

    Raises:
        UserError: The tokens of two conditions differ in length.

    References:
        Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598, algorithm 1; with several
        conditions: Brooks et al. 2023, InstructPix2Pix, arXiv:2211.09800, section 3.2.1.
    """

    def __init__(self, conditions: Mapping[str, Condition[Any]]) -> None:
        super().__init__()
        self.names = tuple(conditions)
        self.conditions = nn.ModuleDict({module_key(name): condition for name, condition in conditions.items()})
        self.dim = sum(condition.dim for condition in conditions.values())
        token_dims = {name: condition.token_dim for name, condition in conditions.items() if condition.token_dim}
        if len(set(token_dims.values())) > 1:
            raise UserError(f"the tokens of all conditions must have one length; token_dim is {token_dims}")
        self.token_dim = next(iter(token_dims.values()), 0)
        labels, numbers = ([n for n, c in conditions.items() if c.kind == kind] for kind in ("label", "number"))
        # balanced classes of one label need no training items
        self.observed = ObservedConditions(labels, numbers) if numbers or len(labels) > 1 else None

    def __getitem__(self, name: str) -> Condition[Any]:
        return cast("Condition[Any]", self.conditions[module_key(name)])

    def of_kind(self, kind: type[C]) -> dict[str, C]:
        """The conditions of one class, by name."""
        conditions = {name: self[name] for name in self.names}
        return {name: condition for name, condition in conditions.items() if isinstance(condition, kind)}

    @property
    def labels(self) -> dict[str, LabelCondition]:
        """The label conditions by name."""
        return self.of_kind(LabelCondition)

    @property
    def primary_label(self) -> str | None:
        """The label condition named "label", else the first one; None without label conditions."""
        labels = self.labels
        return "label" if "label" in labels else next(iter(labels), None)

    @property
    def classes(self) -> int:
        """Number of classes of the primary label; 0 without one."""
        name = self.primary_label
        return 0 if name is None else self.labels[name].classes

    def forward(self, raw: Raw, count: int, generator: Generator | None = None) -> Cond:
        """The condition of `count` items.

        Args:
            raw: Values of the conditions by name.
            count: Number B of items.
            generator: CPU generator that draws which conditions are dropped; None drops none, as in sampling.

        Raises:
            ValueError: A name is unknown, or has not one value per item.
        """
        for name, values in raw.values.items():
            if name not in self.names:
                raise ValueError(f"unknown condition {name!r}: {nearest(name, self.names)}")
            if len(values) != count:
                raise ValueError(f"condition {name!r} has {len(values)} values for {count} items")
        dropped = self.draw_dropout(count, generator)
        return _concat([self._embed(name, raw, count, dropped[name]) for name in self.names])

    def draw_dropout(self, count: int, generator: Generator | None) -> dict[str, Tensor]:
        """Draw for each condition the items (B,) for which training drops it; without a generator none.

        Guidance needs items without any condition. So if there are several, the first draw drops all of them together,
        with the largest of their shares; then each has a draw of its own. All draws are made, whatever the shares.
        """
        if generator is None:
            return {name: torch.zeros(count, dtype=torch.bool) for name in self.names}
        shares = {name: self[name].dropout for name in self.names}
        together = torch.zeros(count, dtype=torch.bool)
        if len(shares) > 1:
            together = torch.rand(count, generator=generator) < max(shares.values())
        return {name: together | (torch.rand(count, generator=generator) < share) for name, share in shares.items()}

    def _embed(self, name: str, raw: Raw, count: int, dropped: Tensor) -> Cond:
        condition = self[name]
        return condition(raw.values[name], dropped) if name in raw.values else condition.null(count)


def module_key(name: str) -> str:
    """The key of a condition in an `nn.ModuleDict`: its name, escaped where that is empty, dotted or an attribute."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%{key}" if not key or hasattr(nn.ModuleDict(), key) else key


def _concat(conds: Sequence[Cond]) -> Cond:
    """Concatenate vectors (B, D_i) along D, tokens (B, M_i, D) and masks (B, M_i) along M."""
    vectors = [cond.vector for cond in conds if cond.vector is not None]
    tokens = [cond.tokens for cond in conds if cond.tokens is not None]
    masks = [cond.mask for cond in conds if cond.mask is not None]
    return Cond(
        vector=torch.cat(vectors, dim=1) if vectors else None,
        tokens=torch.cat(tokens, dim=1) if tokens else None,
        mask=torch.cat(masks, dim=1) if masks else None,
    )
