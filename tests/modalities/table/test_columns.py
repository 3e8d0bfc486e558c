"""Cells of text and Parquet files keep their format when they are read and written back."""

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sfumato.errors import UserError
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.impute import write_imputed
from sfumato.modalities.table.read import read_rows, read_table
from sfumato.modalities.table.write import write_table
from tests.modalities.table.common import OTHER, N, round_trip, write_column


@pytest.mark.parametrize(
    ("sentinel", "date_format"),
    [("9999-12-31", "%Y-%m-%d"), ("0001-01-01", "%Y-%m-%d"), ("31/12/2999", "%d/%m/%Y")],
)
def test_sentinel_dates_are_dates(tmp_path: Path, sentinel: str, date_format: str) -> None:
    days = pd.date_range("2024-01-15", periods=N).strftime(date_format).tolist()
    column, _ = round_trip(tmp_path, [sentinel if i % 3 == 0 else day for i, day in enumerate(days)])
    assert column.kind == "date" and column.format == date_format and column.step == 86400


def test_large_integers_stay_integers(tmp_path: Path) -> None:
    assert round_trip(tmp_path, [str(1_700_000_000_000_000 + i * i) for i in range(N)])[0].kind == "integer"


def round_trip_parquet(path: Path, cells: pa.Array, **options: object) -> tuple[Column, TableDataset]:
    """Like `round_trip`, with cells of an Arrow type, which they keep."""
    pq.write_table(pa.table({"other": OTHER, "x": cells}), path / "t.parquet")
    stored = pq.read_table(path / "t.parquet")["x"]
    data, _ = read_table(path / "t.parquet", **options)
    again = write_table(path / "again.parquet", data.columns, data.store)
    assert pq.read_table(again)["x"].equals(stored)
    np.testing.assert_array_equal(read_rows(again, data.columns).store, data.store)
    written = write_table(path / "again.csv", data.columns, data.store)
    np.testing.assert_array_equal(read_rows(written, data.columns).store, data.store)
    return data.columns[1], data


def day(i: int) -> datetime.datetime:
    return datetime.datetime(2024, 1, 1 + i, 12 * (i % 2))


ONE, TWO = [[day(i % n) for i in range(N)] for n in (1, 2)]
WHOLE = pa.decimal128(10, 2)


@pytest.mark.parametrize(
    ("cells", "kind", "forced"),
    [
        (pa.array(ONE, pa.timestamp("ns")), "constant", False),
        (pa.array(ONE, pa.timestamp("us", "Europe/Paris")), "constant", False),
        (pa.array([d.date() for d in ONE]), "constant", False),
        (pa.array(TWO, pa.timestamp("us")), "category", True),
        (pa.array([d if i % 3 else None for i, d in enumerate(TWO)], pa.timestamp("ms")), "category", True),
        (pa.array([d.date() for d in TWO]), "category", True),
        (pa.array([i % 2 for i in range(N)]).cast(pa.decimal128(19, 0)).cast(pa.decimal128(1, 0)), "boolean", False),
        (pa.array([float(i % 3) for i in range(N)]).cast(WHOLE), "category", False),
        (pa.array([float(i + 1) for i in range(N)]).cast(WHOLE), "id", False),
        (pa.array([7.0] * N).cast(WHOLE), "constant", False),
        (pa.array([f"2024-01-{1 + i % 28:02d}" for i in range(N)]), "date", False),
        (pa.array([f"{1 + i % 28:02d}.{1 + i % 12:02d}.2024" if i % 3 else None for i in range(N)]), "date", False),
        (pa.array([f"2024-01-{1 + i % 3:02d}" for i in range(N)]).dictionary_encode(), "date", False),
        (pa.array([f"{10 + i * i % 7}.5" for i in range(N)]), "number", False),
    ],
)
def test_parquet_keeps_its_cells(tmp_path: Path, cells: pa.Array, kind: str, forced: bool) -> None:
    assert round_trip_parquet(tmp_path, cells, categorical=["x"] * forced)[0].kind == kind


def test_levels_of_parquet_dates_are_date_texts(tmp_path: Path) -> None:
    assert round_trip_parquet(tmp_path, pa.array(TWO), categorical=["x"])[0].levels == [
        "2024-01-01 00:00:00",
        "2024-01-02 12:00:00",
    ]


@pytest.mark.parametrize(
    ("cells", "imputed"),
    [
        (pa.array([float(i % 3) if i % 4 else None for i in range(N)]).cast(WHOLE), [decimal.Decimal(1)]),
        (pa.array(["01.01.2024" if i % 3 else None for i in range(N)]), ["02.01.1970"]),
    ],
)
def test_imputed_cells_have_the_type_of_the_others(tmp_path: Path, cells: pa.Array, imputed: list[object]) -> None:
    pq.write_table(pa.table({"other": OTHER, "x": cells}), tmp_path / "t.parquet")
    data, _ = read_table(tmp_path / "t.parquet")
    column, width = data.columns[1], {"date": 86400.0}
    values = np.nan_to_num(data.store, nan=width.get(column.kind, 1.0))
    write_imputed(tmp_path / "full.parquet", [tmp_path / "t.parquet"], data.columns, values, False)
    imputed_file = pq.read_table(tmp_path / "full.parquet")["x"]
    assert imputed_file.type == cells.type and imputed_file.filter(pc.is_null(cells)).unique().to_pylist() == imputed
    assert imputed_file.filter(pc.is_valid(cells)).to_pylist() == cells.drop_null().to_pylist()


def times(*offsets: str) -> list[str]:
    return [f"2024-01-{1 + i % 28:02d}T00:00:00{offsets[i % len(offsets)]}" for i in range(N)]


@pytest.mark.parametrize("offset", ["+02:00", "-0330", "Z"])
def test_a_shared_utc_offset_is_kept(tmp_path: Path, offset: str) -> None:
    column, _ = round_trip(tmp_path, times(offset))
    assert column.kind == "date" and column.step == 86400  # of local time
    at_utc = read_rows(write_column(tmp_path / "t.csv", times("+00:00")), [column]).store[0, 0]
    offset_seconds = {"+02:00": 7200, "-0330": -12600}
    if offset in offset_seconds:
        assert at_utc == pd.Timestamp("2024-01-01").timestamp() + offset_seconds[offset]


def test_times_with_several_utc_offsets_are_written_in_utc(tmp_path: Path) -> None:
    cells = times("+02:00", "-03:30")
    data, _ = read_table(write_column(tmp_path / "t.csv", cells))
    again = write_table(tmp_path / "again.csv", data.columns, data.store)
    written = pd.read_csv(again)["x"]
    assert written[0] == "2023-12-31T22:00:00+00:00" and written[1] == "2024-01-02T03:30:00+00:00"
    np.testing.assert_array_equal(read_rows(again, data.columns).store, data.store)
    assert any("several UTC offsets; new times are in UTC" in note for note in data.notes)


@pytest.mark.parametrize(
    ("texts", "missing", "levels"),
    [
        (["none", "basic", "full"], None, ["basic", "full", "none"]),  # a level like any other
        (["none", "basic", ""], "", ["basic", "none"]),
        (["NA", "UK", "DE"], "NA", ["DE", "UK"]),
        (["NA", "UK", ""], "", ["NA", "UK"]),  # empty cells are missing, and NA may be Namibia
        (["NA", "UK", "?", "?"], "?", ["NA", "UK"]),
        (["yes", "no", "none"], "none", ["no", "yes"]),
        (["1", "2", "none"], None, ["1", "2", "none"]),
        (["none", "none", "basic"], None, ["none", "basic"]),
    ],
)
def test_missing_markers_of_categories(
    tmp_path: Path, texts: list[str], missing: str | None, levels: list[str]
) -> None:
    column, data = round_trip(tmp_path, [texts[i % len(texts)] for i in range(N)])
    assert column.missing == missing and column.levels == levels
    assert any(f"read as missing: {missing!r} in 'x'" in note for note in data.notes) == bool(missing)


def test_none_is_a_level_of_a_declared_category(tmp_path: Path) -> None:
    cells = [["yes", "no", "none"][i % 3] for i in range(N)]
    column, _ = round_trip(tmp_path, cells, categorical=["x"])
    assert column.missing is None and column.levels == ["no", "none", "yes"]


@pytest.mark.parametrize(
    ("number", "markers"), [("{}", ["none", "NA"]), ("2.{}", ["?", "null"]), ("2024-01-{:02d}", ["None", "nat"])]
)
def test_missing_markers_of_numbers_and_dates(tmp_path: Path, number: str, markers: list[str]) -> None:
    cells = [markers[i % 5] if i % 5 < 2 else number.format(1 + i % 28) for i in range(N)]
    data, _ = read_table(write_column(tmp_path / "t.csv", cells))
    assert not data.columns[1].levels and np.isnan(data.store[:, 1]).sum() == 2 * N // 5


@pytest.mark.parametrize(("texts", "missing"), [(["", "a"], None), (["", None, "a"], ""), (["?", "a", None], "")])
def test_only_null_texts_of_parquet_are_missing(tmp_path: Path, texts: list[str | None], missing: str | None) -> None:
    pq.write_table(pa.table({"other": OTHER, "x": [texts[i % len(texts)] for i in range(N)]}), tmp_path / "t.parquet")
    data, _ = read_table(tmp_path / "t.parquet")
    again = write_table(tmp_path / "again.parquet", data.columns, data.store)
    assert pq.read_table(again).equals(pq.read_table(tmp_path / "t.parquet")) and data.columns[1].missing == missing


def test_only_missing_cells_are_imputed(tmp_path: Path) -> None:
    texts = ["none", "basic", ""]
    source = write_column(tmp_path / "t.csv", [texts[i % 3] for i in range(N)])
    data, _ = read_table(source)
    imputed_file = tmp_path / "full.csv"
    write_imputed(imputed_file, [source], data.columns, np.nan_to_num(data.store), False)
    assert pd.read_csv(imputed_file, keep_default_na=False)["x"].tolist() == ["none", "basic", "basic"] * (N // 3)
    unknown = write_column(tmp_path / "strange.csv", ["none"] * N)
    known = [data.columns[0], Column("x", "category", levels=["basic"], missing="")]
    write_imputed(imputed_file, [unknown], known, np.zeros((N, 2)), True)
    assert set(pd.read_csv(imputed_file, keep_default_na=False)["x"]) == {"none"}  # unknown, but present


def test_unreadable_columns_can_be_excluded(tmp_path: Path) -> None:
    tag = pa.array([[i] for i in range(N)])
    at = pa.array([datetime.time(1, i) for i in range(N)])
    numbers = pa.array([i * i % 83 if i % 4 else None for i in range(N)])
    pq.write_table(pa.table({"tag": tag, "at": at, "x": numbers}), tmp_path / "t.parquet")
    data, _ = read_table(tmp_path / "t.parquet", exclude=["tag", "at"])
    assert [column.name for column in data.columns] == ["x"]
    again = read_rows(tmp_path / "t.parquet", data.columns)
    np.testing.assert_array_equal(again.store, data.store)
    write_imputed(tmp_path / "full.parquet", [tmp_path / "t.parquet"], data.columns, np.nan_to_num(data.store), False)
    imputed_file = pq.read_table(tmp_path / "full.parquet")
    assert imputed_file["tag"].to_pylist() == tag.to_pylist() and imputed_file["x"].null_count == 0
    with pytest.raises(UserError, match=r"column 'at' holds time64\[us\]; exclude it.*--exclude at"):
        read_table(tmp_path / "t.parquet", exclude=["tag"])


def test_a_pandas_index_is_an_id(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(N) ** 2 % 83}, index=100 + 3 * np.arange(N))
    frame.to_parquet(tmp_path / "t.parquet")
    data, _ = read_table(tmp_path / "t.parquet")
    assert {column.name: column.kind for column in data.columns} == {"x": "integer", "__index_level_0__": "id"}


@pytest.mark.parametrize(
    ("cell", "date_format", "step"),
    [
        (lambda i: f"2024-01-{1 + i % 28:02d} {i % 24:02d}:{i % 60:02d}:07+00", "%Y-%m-%d %H:%M:%S+00", 1.0),
        (lambda i: f"2024-01-{1 + i % 28:02d} {i % 24:02d}:{i % 60:02d}:07-05", "%Y-%m-%d %H:%M:%S-05", 1.0),
        (lambda i: f"2024-01-{1 + i % 28:02d}T12:{i % 60:02d}:00.{37 * i % 1000:03d}Z", "%Y-%m-%dT%H:%M:%S.%fZ", 1e-6),
        (
            lambda i: f"2024-01-{1 + i % 28:02d} 12:{i % 60:02d}:00.{37 * i % 1000:03d}0000",
            "%Y-%m-%d %H:%M:%S.%f",
            1e-6,
        ),
        (lambda i: f"{1 + i % 12}/{1 + i % 28}/2024 {i % 24}:{i % 60:02d}", "%m/%d/%Y %H:%M", 60.0),
        (lambda i: f"2024-{1 + i % 12}-{1 + i % 28}", "%Y-%m-%d", 86400.0),
        (lambda i: f"{i % 24}:{i % 60:02d}", "%H:%M", 60.0),
        (lambda i: f"2024-01-{1 + i % 28:02d} {1 + i % 12}:{i % 60:02d} AM", "%Y-%m-%d %I:%M %p", 60.0),
        (lambda i: f"{1 + i % 12}/{1 + i % 28}/2024 {i % 24:02d}:{i % 60:02d}", "%m/%d/%Y %H:%M", 60.0),
        (lambda i: f"2024-01-{1 + i % 28:02d} 12:00:00.{1 + 3571 * i:06d} UTC", "%Y-%m-%d %H:%M:%S.%f UTC", 1e-6),
        (lambda i: f"{1 + i % 28:02d}.12.2024 10:00:00.{17 * i % 1000:03d}", "%d.%m.%Y %H:%M:%S.%f", 1e-6),
    ],
)
def test_times_keep_their_format(tmp_path: Path, cell: Callable[[int], str], date_format: str, step: float) -> None:
    column, _ = round_trip(tmp_path, [cell(i) for i in range(N)])
    assert (column.kind, column.format, column.step) == ("date", date_format, step)


@pytest.mark.parametrize("position", [0, 7, N - 1])
def test_one_text_among_dates_is_refused(tmp_path: Path, position: int) -> None:
    cells = [f"2024-01-{1 + i % 28:02d} 12:{i % 60:02d}:{i % 50:02d}" for i in range(N)]
    cells[position] = "n.d."
    with pytest.raises(UserError, match=r"holds dates, and also 'n\.d\.'; correct that cell"):
        round_trip(tmp_path, cells)


def test_points_separate_thousands_beside_decimal_commas(tmp_path: Path) -> None:
    rows = [f"{i % 17},{10 + i % 90};{f'{1 + i % 9}.{100 + i % 800}' if i % 3 else 900 + i % 99}" for i in range(N)]
    (tmp_path / "t.csv").write_text("\n".join(["paid;count", *rows]))
    train, held = read_table(tmp_path / "t.csv")
    count = train.columns[1]
    assert (count.kind, count.thousands, train.dialect.decimal) == ("integer", ".", ",")
    assert min(train.values[:, 1].min(), held.values[:, 1].min()) >= 900
    assert any("'2.101' is read as 2101" in note for note in train.notes)


@pytest.mark.parametrize("names", ["0,1,2,3", "id,1,2,3,4", "place,2019,2020,2021,2022"])
def test_enumerated_names_are_a_header(tmp_path: Path, names: str) -> None:
    width = names.count(",") + 1
    rows = [
        ",".join(["ab"[i % 2] if names[0].isalpha() else str(i % 9), *(str(1 + (i + k) % 5) for k in range(width - 1))])
        for i in range(N)
    ]
    (tmp_path / "t.csv").write_text("\n".join([names, *rows]))
    train, held = read_table(tmp_path / "t.csv")
    assert [column.name for column in train.columns] == names.split(",") and len(train) + len(held) == N


def test_the_refused_text_is_the_one_that_is_not_a_date(tmp_path: Path) -> None:
    """The first cells also match the day-first format; later ones do not."""
    cells = [f"{1 + i % 12:02d}/{1 + (i + i // 12) % 28:02d}/20{i // 300 + 10}" for i in range(400)]
    cells[390] = "TBD"
    pd.DataFrame({"other": [str(i * 37 % 101) for i in range(400)], "x": cells}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match="holds dates, and also 'TBD'"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("names", ["0,1", "1,2"])
def test_two_numbers_are_not_a_header(tmp_path: Path, names: str) -> None:
    (tmp_path / "t.csv").write_text("\n".join([names, *(f"{i},{i * 37 % 101}" for i in range(N))]))
    with pytest.raises(UserError, match="has no header"):
        read_table(tmp_path / "t.csv")
