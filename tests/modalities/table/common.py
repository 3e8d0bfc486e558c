"""Tables of two columns: `other`, and one with given cells."""

from pathlib import Path

import numpy as np
import pandas as pd

from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.read import read_rows, read_table
from sfumato.modalities.table.write import write_table

N = 60
OTHER = [str(i * 37 % 101) for i in range(N)]


def write_column(path: Path, cells: list[str], name: str = "x") -> Path:
    pd.DataFrame({"other": OTHER, name: cells}).to_csv(path, index=False)
    return path


def round_trip(path: Path, cells: list[str], **options: object) -> tuple[Column, TableDataset]:
    """The inferred column `x` of these cells, and the table; reading and writing must not change the cells."""
    data, _ = read_table(write_column(path / "t.csv", cells), **options)
    again = write_table(path / "again.csv", data.columns, data.store, dialect=data.dialect)
    assert pd.read_csv(again, dtype=str, keep_default_na=False)["x"].tolist() == cells
    np.testing.assert_array_equal(read_rows(again, data.columns).store, data.store)
    return data.columns[1], data
