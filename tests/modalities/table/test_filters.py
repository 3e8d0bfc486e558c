"""Conditions on columns and levels as users type them."""

from pathlib import Path

import numpy as np
import pytest

from sfumato.errors import UserError
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.filters import balance_levels, fixed_values, parse_conditions
from sfumato.modalities.table.read import read_table
from tests.modalities.table.common import N, write_column

COLUMNS = [
    Column("income", "category", [" <=50K", " >50K"]),
    Column(" age", "integer", decimals=0),
    Column("price", "number", decimals=2),
    Column("a<b", "number"),
    Column("a", "category", ["x", " x"]),
    Column("country", "constant", value="DE"),
    Column("kids", "category", ["2", "0", "10"], missing=""),
    Column("weight", "category", ["2.0", "1.0"]),
    Column("day", "date", format="%d.%m.%Y", step=86400.0),
    Column("row", "id"),
    Column("plan", "category", ["basic", "none"]),
]
ROWS = np.array(
    [  # of the modelled columns
        [0.0, 20, 1.25, 1, 0, 0, 0, 0, 0],
        [1.0, 40, 1.75, 5, 1, 1, 1, 86400 * 365, 1],
        [1.0, 60, 9.5, 9, 0, 2, 1, 86400 * 730, 1],
        [np.nan] * 9,
    ]
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("income=>50K", [1, 2]),
        ("income= >50K", [1, 2]),
        ("income=<=50K", [0]),
        ("age>30", [1, 2]),
        (" age > 30 ", [1, 2]),
        ("price>1,5", [1, 2]),
        ("price>1.5", [1, 2]),
        ("a<b>3", [1, 2]),
        ("a<b>=9", [2]),
        ("a=x", [0, 2]),
        ("a= x", [1]),
        ("kids>=2", [0, 2]),
        ("kids<2", [1]),
        ("kids!=0", [0, 2]),
        ("kids=", [3]),
        ("weight=1", [1, 2]),
        ("weight<1.5", [1, 2]),
        ("day>=1971-01-01", [1, 2]),
        ("day>=01.01.1972", [2]),
        ("plan=none", [1, 2]),
    ],
)
def test_conditions_match_rows(text: str, rows: list[int]) -> None:
    assert np.flatnonzero(parse_conditions(COLUMNS, [text])(ROWS)).tolist() == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("country=DE", "no column 'country' in the model: it is constant"),
        ("row=3", "no column 'row' in the model: it is unique in every row"),
        ("agee>3", "no column 'agee'; did you mean ' age'"),
        ("income>3", "holds categories, which compare with = or !="),
        ("kids=9", "'9' was never seen"),
        ("kids>", "holds numbers, and '' is not a number"),
        ("price>nan", "holds numbers, and 'nan' is not a number"),
        ("day>soon", "'soon' is not a date of the column's format"),
        ("income", "write COLUMN=VALUE"),
    ],
)
def test_invalid_conditions(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_conditions(COLUMNS, [text])


def test_equality_fixes_values() -> None:
    fixed = fixed_values(COLUMNS, ["income= >50K", "kids>=2", "age=30"])
    assert fixed[:2].tolist() == [1, 30] and np.isnan(fixed[2:]).all()


def test_blanks_around_names_are_optional(tmp_path: Path) -> None:
    assert balance_levels([Column(" kind ", "category", ["a"])], "kind") == (0, ["a"])
    source = write_column(tmp_path / "t.csv", [str(i % 40) for i in range(N)], " hour")
    assert read_table(source, categorical=["hour"])[0].columns[1].kind == "category"
    assert len(read_table(source, exclude=["hour"])[0].columns) == 1
