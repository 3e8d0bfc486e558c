"""Cells as they are spelt in files: what is read is written back in the same way."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sfumato.data import Column, TableData, read_rows, read_table, write_table

N = 60
OTHER = [str(i * 37 % 101) for i in range(N)]


def lay_down(path: Path, cells: list[str], name: str = "x") -> Path:
    pd.DataFrame({"other": OTHER, name: cells}).to_csv(path, index=False)
    return path


def through(path: Path, cells: list[str], **options: object) -> tuple[Column, TableData]:
    """What the column `x` with these cells is, and the table; the cells must come back as they are."""
    data, _ = read_table(lay_down(path / "t.csv", cells), **options)
    again = write_table(path / "again.csv", data.columns, data.store, dialect=data.dialect)
    assert pd.read_csv(again, dtype=str, keep_default_na=False)["x"].tolist() == cells
    np.testing.assert_array_equal(read_rows(again, data.columns).store, data.store)
    return data.columns[1], data


@pytest.mark.parametrize(
    ("sentinel", "layout"),
    [("9999-12-31", "%Y-%m-%d"), ("0001-01-01", "%Y-%m-%d"), ("31/12/2999", "%d/%m/%Y")],
)
def test_dates_that_stand_for_none(tmp_path: Path, sentinel: str, layout: str) -> None:
    days = pd.date_range("2024-01-15", periods=N).strftime(layout).tolist()
    column, _ = through(tmp_path, [sentinel if i % 3 == 0 else day for i, day in enumerate(days)])
    assert column.kind == "date" and column.format == layout and column.step == 86400
