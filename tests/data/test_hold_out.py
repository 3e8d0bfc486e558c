"""Which rows of a table are held out: as many as comparing needs, and the same however its columns are read."""

from pathlib import Path

import numpy as np
import pytest

from sfumato.data import hold_out, read_rows, read_table


def written(place: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{i},{rng.integers(0, 5)},{rng.normal():.4f}" for i in range(count)]
    (place / "t.csv").write_text("\n".join(["number,grade,x", *rows]) + "\n")
    return place / "t.csv"


@pytest.mark.parametrize(("count", "held"), [(1_000, 100), (150, 20), (80, 20), (60, 15), (24, 6)])
def test_small_tables_hold_out_more(tmp_path: Path, count: int, held: int):
    train, other = read_table(written(tmp_path, count))
    assert (len(train), len(other)) == (count - held, held)


def test_the_same_rows_are_held_out_however_columns_are_read(tmp_path: Path):
    path = written(tmp_path, 300)
    plain = read_table(path)[1]
    numbers = [column.name for column in plain.columns if column.kind in ("number", "integer")]
    assert "x" in numbers
    which = set(plain.values[:, -1])
    for how in ({"categorical": ["grade"]}, {"exclude": ["grade"]}, {"exclude": ["number"]}):
        assert set(read_table(path, **how)[1].values[:, -1]) == which, how
    again = hold_out(read_rows(path, plain.columns), 0.1)[1]
    assert set(again.values[:, -1]) == which
