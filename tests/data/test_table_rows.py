"""Which rows of a table are held out, and what a user says that columns are."""

from pathlib import Path

import numpy as np
import pytest

from sfumato.data import read_rows, read_table, split
from sfumato.errors import UserError


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
    again = split(read_rows(path, plain.columns), 0.1)[1]
    assert set(again.values[:, -1]) == which


def test_numbers_that_look_like_something_else(tmp_path: Path):
    path = written(tmp_path, 300)
    kinds = lambda **how: {column.name: column.kind for column in read_table(path, **how)[0].columns}
    assert kinds() == {"number": "id", "grade": "category", "x": "number"}
    assert kinds(numeric=["number", "grade"]) == {"number": "integer", "grade": "integer", "x": "number"}
    for how, said in (
        ({"numeric": ["grades"]}, "numeric: no column 'grades'"),
        ({"numeric": ["x"], "categorical": ["x"]}, "cannot be both categorical and numeric"),
    ):
        with pytest.raises(UserError, match=said):
            read_table(path, **how)
    path.write_text(path.read_text().replace("number,grade,x\n0,", "number,grade,x\nfirst,"))
    with pytest.raises(UserError, match=r"'number' is no column of numbers .'first'., as --numeric says"):
        read_table(path, numeric=["number"])
