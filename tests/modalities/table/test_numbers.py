"""Formatted numbers are read as numbers and written in their format; mixed formats are refused."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from sfumato.errors import UserError
from sfumato.modalities.table.filters import parse_conditions
from sfumato.modalities.table.formats import Dialect
from sfumato.modalities.table.numbers import NumberFormat, format_number, parse_numbers
from sfumato.modalities.table.read import read_rows, read_table
from tests.modalities.table.common import N, round_trip, write_column

VALUES = np.random.default_rng(0).lognormal(5, 3, N).round(2).tolist()


@pytest.mark.parametrize(
    ("write", "first"),
    [
        (lambda v: f"{v:.2f}%", None),
        (lambda v: f"{v:.2f} %", None),
        (lambda v: f"${v:,.2f}", None),
        (lambda v: f"-${v:.2f}", -VALUES[0]),
        (lambda v: f"EUR {v:.2f}", None),
        (lambda v: f"{v:.2f} km/h", None),
        (lambda v: f"{v:,.2f}", None),
        (lambda v: f"{v:.2f}".replace(".", ","), None),
        (lambda v: f"{v:,.2f}".translate({44: ".", 46: ","}) + " €", None),
        (lambda v: f"{v:,.2f}".replace(",", "'"), None),
        (lambda v: f"{v:,.0f}", round(VALUES[0])),
        (lambda v: f"{v:.4f}", None),  # trailing zeros
        (lambda v: f"{v}kg", None),
    ],
)
def test_number_formats(tmp_path: Path, write, first: float | None) -> None:
    column, data = round_trip(tmp_path, [write(value) for value in VALUES])
    assert column.kind in ("number", "integer") and data.store[0, 1] == (VALUES[0] if first is None else first)
    assert column.decimals in (0, 2)


def test_a_note_tells_how_formatted_numbers_are_read(tmp_path: Path) -> None:
    data = round_trip(tmp_path, [f"{1 + i},{100 + i * i % 800}" for i in range(N)])[1]
    assert any("column 'x': '1,100' is read as 1100" in note for note in data.notes)


def test_a_thousands_separator_in_a_semicolon_table(tmp_path: Path) -> None:
    lines = [f"{i * 37 % 101};{1 + i}.{100 + i * i % 800},{10 + i % 90}" for i in range(N)]
    (tmp_path / "t.csv").write_text("\n".join(["o;x", *lines]))
    data, _ = read_table(tmp_path / "t.csv")
    assert data.dialect.delimiter == ";" and data.store[0, 1] == 1100.10


def test_the_affix_is_optional_in_samples(tmp_path: Path) -> None:
    column, _ = round_trip(tmp_path, [f"${value:,.2f}" for value in VALUES])
    plain = read_rows(write_column(tmp_path / "t.csv", [str(value) for value in VALUES]), [column])
    assert plain.store[:, 0].tolist() == VALUES
    assert parse_conditions([column], ["x>$1,000"])(plain.store).tolist() == [value > 1000 for value in VALUES]


@pytest.mark.parametrize(
    "date_format",
    ["%H:%M:%S", "%H:%M", "%I:%M %p", "%m/%d/%Y %I:%M %p", "%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%d %I:%M:%S %p"],
)
def test_times_of_day(tmp_path: Path, date_format: str) -> None:
    stamps = pd.Timestamp("2024-01-15") + pd.to_timedelta(np.arange(N) ** 2 * 1777 % 10**6, unit="s")
    column, _ = round_trip(tmp_path, stamps.strftime(date_format).tolist())
    assert column.kind == "date" and column.format == date_format


@pytest.mark.parametrize(
    ("cells", "like"),
    [
        ([f"${i}.50" if i % 2 else f"€{i}.50" for i in range(N)], "€0.50"),
        ([f"{i * i % 47}%" if i % 30 else "a few" for i in range(N)], "1%"),
        ([f"{1 + i} {100 + i}" for i in range(N)], "1 100"),
        ([f"{20 + i % 30}:{i % 60:02d}" for i in range(N)], "20:00"),
    ],
)
def test_mixed_number_formats_are_refused(tmp_path: Path, cells: list[str], like: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"column 'x' holds numbers or times such as {like!r}")) as error:
        read_table(write_column(tmp_path / "t.csv", cells))
    assert "--exclude" in str(error.value) and error.value.code == 1 and "\n" not in str(error.value)
    assert read_table(tmp_path / "t.csv", categorical=["x"])[0].columns[1].kind == "category"


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([f"{10 * (1 + i % 3)} mg" for i in range(N)], "category"),
        ([f"{i}{'abc'[i % 3]}" for i in range(N)], "id"),
        ([f"10.0.{i % 7}.{i}" for i in range(N)], "id"),
        ([f"00{i:03d}" for i in range(N)], "id"),
        ([f"A{i},{i}" for i in range(N)], "id"),
    ],
)
def test_ids_are_not_numbers(tmp_path: Path, cells: list[str], kind: str) -> None:
    data, _ = read_table(write_column(tmp_path / "t.csv", cells))
    assert data.columns[1].kind == kind and not any("is read as" in note for note in data.notes)


def test_numbers_and_their_texts() -> None:
    swiss = NumberFormat(",", "'", "{} Fr.")
    texts = ["1'234'567,5 Fr.", "-0,25 Fr.", "12"]
    values = parse_numbers(pa.array(texts), swiss).to_pylist()
    assert values == [1234567.5, -0.25, 12.0]
    assert [format_number(value, swiss) for value in values] == [*texts[:2], "12 Fr."]
    assert format_number(3.0, point=True) == "3.0" and format_number(2.5, digits=3) == "2.500"
    assert format_number(2.0**53) == "9007199254740992" and format_number(1e20) == "1e+20"
    with pytest.raises(pa.ArrowInvalid):
        parse_numbers(pa.array(["1,5"]), NumberFormat(".", ","))


def test_a_format_that_appears_in_a_later_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.modalities.table.formats.BLOCK_BYTES", 200)
    column, data = round_trip(tmp_path, [f"{i * i + 7:,}" for i in range(N)])
    assert column.thousands == "," and column.kind == "integer" and data.store[-1, 1] == 59**2 + 7
    assert data.dialect == Dialect()
