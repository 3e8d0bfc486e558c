"""The rows of a table, served as batches."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.data.dataset import Fingerprinted, Index, Unlabelled
from sfumato.modalities.table.columns import Column, Values, modelled
from sfumato.modalities.table.formats import Dialect
from sfumato.types import Batch

HASH_ROWS = 2**16  # rows that are hashed at a time
KIND_NAMES = {  # headings of `describe`
    **{"number": "numbers", "integer": "integers", "category": "categories", "boolean": "yes or no", "date": "dates"},
    **{"id": "ids, not learned", "constant": "always the same, not learned"},
}


@dataclass(eq=False)
class TableDataset(Unlabelled, Fingerprinted):
    """Rows of a table as numbers.

    Args:
        store: The modelled columns (M, D) in float64: numbers, level indices, seconds; NaN if missing. Shared between
            subsets.
        columns: All columns of the source; `modelled(columns)` are those of the store.
        dialect: Dialect of a text source.
        rows: Indices (N,) of the items in `store`; default all rows.
        notes: Messages to the user about how the data were read.
        file_hash: sha256 of the source file, if there is only one.
    """

    min_held_out: ClassVar[int] = 20  # rows that the metrics need

    store: Values
    columns: list[Column]
    dialect: Dialect = field(default_factory=Dialect)
    rows: NDArray[np.int64] | None = None
    notes: list[str] = field(default_factory=list)
    file_hash: str = ""

    def __post_init__(self) -> None:
        assert self.store.shape[1:] == (len(modelled(self.columns)),), self.store.shape
        assert self.store.dtype == np.float64

    def __len__(self) -> int:
        return len(self.store) if self.rows is None else len(self.rows)

    @property
    def spec(self) -> dict[str, Any]:
        """The columns and the dialect, as a JSON value."""
        return {"columns": [asdict(column) for column in self.columns], "dialect": asdict(self.dialect)}

    @property
    def shape(self) -> tuple[int]:
        """(D,) of one row."""
        return (self.store.shape[1],)

    def describe(self) -> list[str]:
        """The columns of each kind, one line per kind."""
        by_kind = {column.kind: [c.name for c in self.columns if c.kind == column.kind] for column in self.columns}
        return [f"{KIND_NAMES[kind]}: {', '.join(names)}" for kind, names in by_kind.items()]

    @property
    def values(self) -> Values:
        """The rows (N, D); a copy if this is a subset."""
        return self.store if self.rows is None else self.store[self.rows]

    def _hash(self) -> str:
        columns = [(c.name, c.kind, c.levels) for c in self.columns]
        digest = hashlib.sha256(repr(("table", self.store.shape, columns)).encode())
        for start in range(0, len(self.store), HASH_ROWS):
            digest.update(np.ascontiguousarray(self.store[start : start + HASH_ROWS]).data)
        digest.update(b"-" if self.rows is None else self.rows.tobytes())
        return digest.hexdigest()

    @property
    def split_key(self) -> str:
        """Seed of the held-out split: the file's hash, so that the columns' types make no difference."""
        return self.file_hash or self.fingerprint

    def batch(self, index: Index) -> Batch:
        """The rows `index` (B,) in float64 (B, D)."""
        positions = np.asarray(index, dtype=np.int64).reshape(-1)
        values = self.store.take(positions if self.rows is None else self.rows[positions], axis=0)
        return Batch(torch.from_numpy(values), torch.from_numpy(positions))

    def subset(self, index: Index) -> TableDataset:
        """The rows `index` (B,) as a data set; the values are shared, not copied."""
        positions = np.asarray(index, dtype=np.int64).reshape(-1)
        part = replace(self, rows=positions if self.rows is None else self.rows[positions], file_hash="")
        part._inherit_fingerprint(self, positions)
        return part
