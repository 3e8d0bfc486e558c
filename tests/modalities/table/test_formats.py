"""The held-out rows of a table, and kinds of columns that the user declares."""

from pathlib import Path

import numpy as np
import pytest

from sfumato.data import split
from sfumato.errors import UserError
from sfumato.modalities.table.read import read_rows, read_table


def write_rows(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{i},{rng.integers(0, 5)},{rng.normal():.4f}" for i in range(count)]
    (folder / "t.csv").write_text("\n".join(["number,grade,x", *rows]) + "\n")
    return folder / "t.csv"


@pytest.mark.parametrize(("count", "held"), [(1_000, 100), (150, 20), (80, 20), (60, 15), (24, 6)])
def test_small_tables_hold_out_more(tmp_path: Path, count: int, held: int):
    train, other = read_table(write_rows(tmp_path, count))
    assert (len(train), len(other)) == (count - held, held)


def test_held_out_rows_do_not_depend_on_the_columns(tmp_path: Path):
    path = write_rows(tmp_path, 300)
    plain = read_table(path)[1]
    numbers = [column.name for column in plain.columns if column.kind in ("number", "integer")]
    assert "x" in numbers
    held_out = set(plain.values[:, -1])
    for options in ({"categorical": ["grade"]}, {"exclude": ["grade"]}, {"exclude": ["number"]}):
        assert set(read_table(path, **options)[1].values[:, -1]) == held_out, options
    again = split(read_rows(path, plain.columns), 0.1)[1]
    assert set(again.values[:, -1]) == held_out


def test_declared_kinds(tmp_path: Path):
    path = write_rows(tmp_path, 300)
    kinds = lambda **options: {column.name: column.kind for column in read_table(path, **options)[0].columns}
    assert kinds() == {"number": "id", "grade": "category", "x": "number"}
    assert kinds(numeric=["number", "grade"]) == {"number": "integer", "grade": "integer", "x": "number"}
    for options, message in (
        ({"numeric": ["grades"]}, "numeric: no column 'grades'"),
        ({"numeric": ["x"], "categorical": ["x"]}, "cannot be both categorical and numeric"),
    ):
        with pytest.raises(UserError, match=message):
            read_table(path, **options)
    path.write_text(path.read_text().replace("number,grade,x\n0,", "number,grade,x\nfirst,"))
    with pytest.raises(UserError, match=r"'number' is not numeric .'first'., as --numeric declares"):
        read_table(path, numeric=["number"])
