"""Inferred columns; tables that are written are read back."""

import dataclasses
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sfumato.data import cache, split
from sfumato.modalities.table import formats
from sfumato.modalities.table.columns import (
    MAX_SPIKES,
    MIN_SPIKE_ROWS,
    Column,
    find_spikes,
    modelled,
    round_values,
)
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.formats import Dialect
from sfumato.modalities.table.read import is_table, read_rows, read_table
from sfumato.modalities.table.write import column_frame, write_table

N = 400
TABLES = Path(os.environ.get("SFUMATO_DATA", "/nowhere")) / "tables"


def words(*texts: str, count: int = N) -> list[str]:
    return [texts[(i * i + i // 5) % len(texts)] for i in range(count)]


def every_kind() -> dict[str, list[str]]:
    """Columns of each kind and format."""
    rng = np.random.default_rng(0)
    ages, money = rng.integers(18, 90, N), rng.normal(0, 1e4, N).round(2)
    days = pd.to_datetime("1960-01-01") + pd.to_timedelta(rng.integers(0, 9000, N), unit="D")
    times = pd.to_datetime("2020-01-01") + pd.to_timedelta(rng.integers(0, 10**6, N), unit="min")
    return {
        "No": [str(i + 1) for i in range(N)],
        "user": [f"u_{i:04d}" for i in rng.permutation(N)],
        "age, in years": [str(v) if i % 7 else "?" for i, v in enumerate(ages)],
        'the "money"': [repr(float(v)).removesuffix(".0") for v in money],
        "continuous": [repr(float(v)) for v in rng.normal(size=N)],
        "whole": [f"{v}.0" if v % 3 else "" for v in ages],
        "zip": [f"{v:05d}" for v in rng.integers(0, 40, N)],
        "grade": words("1", "2", "3", "5"),
        "wins": words("yes", "no", "no"),
        "flag": words("TRUE", "FALSE"),
        "colour": words("red", "a,b", 'say "x"', "two\nlines", "ünï", "NA", "NA"),
        "maybe": words("True", "False", "null", "True"),
        "day": [d.strftime("%d.%m.%Y") for d in days],
        "seen": [d.strftime("%Y-%m-%dT%H:%MZ") if i % 5 else "None" for i, d in enumerate(times)],
        "unit": ["kg"] * N,
        "nothing": ["NaN"] * N,
    }


KINDS = {
    "No": "id",
    "user": "id",
    "age, in years": "integer",
    'the "money"': "number",
    "continuous": "number",
    "whole": "integer",
    "zip": "category",
    "grade": "category",
    "wins": "boolean",
    "flag": "boolean",
    "colour": "category",
    "maybe": "boolean",
    "day": "date",
    "seen": "date",
    "unit": "constant",
    "nothing": "constant",
}


def write_csv(path: Path, columns: dict[str, list[str]], sep: str = ",") -> Path:
    pd.DataFrame(columns).to_csv(path, index=False, sep=sep)
    return path


def infer_column(path: Path, name: str, cells: list[str], **options: object) -> Column:
    """The inferred column `name` with these cells, beside a column of numbers."""
    numbers = [str(i * 37 % 101) for i in range(len(cells))]
    data, _ = read_table(write_csv(path / "t.csv", {"other": numbers, name: cells}), **options)
    return data.columns[1]


def all_values(parts: tuple[TableDataset, TableDataset]) -> np.ndarray:
    """All rows of a table, in their order."""
    return parts[0].store


def test_kinds(tmp_path: Path) -> None:
    data, held = read_table(write_csv(tmp_path / "t.csv", every_kind()))
    assert {c.name: c.kind for c in data.columns} == KINDS
    by = {c.name: c for c in data.columns}
    assert len(data) == 360 and len(held) == 40 and data.shape == (12,)
    assert by["user"].format == "u_{:04d}"
    assert by["age, in years"].missing == "?" and by["age, in years"].decimals == 0
    assert by['the "money"'].decimals == 2 and by["continuous"].decimals is None
    assert by["whole"].point and by["whole"].missing == ""
    assert by["wins"].levels == ["no", "yes"] and by["flag"].levels == ["FALSE", "TRUE"]
    assert by["colour"].missing == "NA" and by["maybe"].missing == "null"
    assert by["day"].step == 86400 and by["day"].format == "%d.%m.%Y" and by["seen"].step == 60
    assert by["unit"].value == "kg" and by["nothing"].value is None and by["nothing"].missing == "NaN"
    known = data.values[:, 0]
    assert by["age, in years"].low == np.nanmin(known) and by["age, in years"].high == np.nanmax(known)
    assert [c.name for c in modelled(data.columns)] == [n for n, k in KINDS.items() if k not in ("id", "constant")]
    assert [Column(**c) for c in json.loads(json.dumps([dataclasses.asdict(c) for c in data.columns]))] == data.columns


def test_levels_are_sorted_by_frequency(tmp_path: Path) -> None:
    assert infer_column(tmp_path, "x", ["c"] * 10 + ["a"] * 30 + ["b"] * 10).levels == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "given", "delimiter"),
    [("t.tsv", ",", "\t"), ("t.tsv.gz", ";", "\t"), ("t.csv", "\t", ","), ("t.csv", ";", ";"), ("t.csv", "|", "|")],
)
def test_the_file_name_determines_the_delimiter(tmp_path: Path, name: str, given: str, delimiter: str) -> None:
    columns = [Column("a", "integer", decimals=0), Column("b", "integer", decimals=0)]
    path = write_table(tmp_path / name, columns, np.ones((3, 2)), dialect=Dialect(given, "."))
    opened = gzip.open(path, "rt") if name.endswith(".gz") else path.open()
    with opened as file:
        assert file.readline() == f"a{delimiter}b\n"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.parquet"])
def test_written_tables_are_read_back(tmp_path: Path, name: str) -> None:
    source = write_csv(tmp_path / "source.csv", every_kind())
    parts = read_table(source)
    path = write_table(tmp_path / name, parts[0].columns, all_values(parts))
    again = read_table(path)
    np.testing.assert_array_equal(all_values(again), all_values(parts))
    np.testing.assert_array_equal(read_rows(path, parts[0].columns).values, all_values(parts))
    if "parquet" not in name:
        same = [dataclasses.replace(c, low=None, high=None) for c in parts[0].columns]
        assert [dataclasses.replace(c, low=None, high=None) for c in again[0].columns][2:] == same[2:]
        assert [c.kind for c in again[0].columns[:2]] == ["id", "id"]
    if name == "t.csv":
        now, then = (pd.read_csv(p, dtype=str, keep_default_na=False).drop(columns="user") for p in (path, source))
        pd.testing.assert_frame_equal(now, then)


@pytest.mark.parametrize("name", ["adult", "beijing", "default", "magic", "shoppers"])
@pytest.mark.skipif(not TABLES.is_dir(), reason="$SFUMATO_DATA has no tables")
def test_real_tables(tmp_path: Path, name: str) -> None:
    schema = json.loads((TABLES / name / "schema.json").read_text())
    train, held = read_table(TABLES / name, categorical=schema["categorical"])
    first, second = (pd.read_csv(TABLES / name / f"{part}.csv") for part in ("train", "test"))
    assert [len(train), len(held)] == [len(first), len(second)]
    assert {c.name for c in train.columns if c.levels} == set(schema["categorical"])
    path = write_table(tmp_path / "out.csv", train.columns, train.values)
    pd.testing.assert_frame_equal(pd.read_csv(path), first)
    pd.testing.assert_frame_equal(column_frame(train.columns, train.values), first.replace("?", np.nan))
    np.testing.assert_array_equal(read_rows(path, train.columns).values, train.values)
    np.testing.assert_array_equal(held.values, read_rows(TABLES / name / "test.csv", train.columns).values)


def test_data_frame_has_the_types(tmp_path: Path) -> None:
    parts = read_table(write_csv(tmp_path / "t.csv", every_kind()))
    frame = column_frame(parts[0].columns, all_values(parts))
    types = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert list(frame) == list(KINDS) and len(frame) == N
    assert types["No"] == types["grade"] == "int64" and types["age, in years"] == "Int64"
    assert types["whole"] == types["continuous"] == "float64"
    assert types["flag"] == "bool" and types["maybe"] == "boolean"
    assert types["day"].startswith("datetime64") and frame["day"].min() < pd.Timestamp(0)
    assert frame["user"].tolist()[:2] == ["u_0001", "u_0002"] and frame["No"].tolist()[-1] == N
    assert frame["age, in years"].isna().sum() == 58 and frame["seen"].isna().sum() == 80
    assert set(frame["unit"]) == {"kg"} and frame["nothing"].isna().all()
    assert frame["zip"].str.len().eq(5).all()


def parquet(path: Path) -> Path:
    rng = np.random.default_rng(0)
    stamps = pd.Series(pd.to_datetime("2020-01-01") + pd.to_timedelta(rng.integers(0, 10**6, N), unit="ms"))
    arrays = {
        "key": pa.array(rng.integers(2**60, 2**61, N)),
        "small": pa.array(rng.integers(0, 100, N), pa.int8(), mask=rng.random(N) < 0.1),
        "single": pa.array(rng.normal(size=N).round(3), pa.float32()),
        "double": pa.array(rng.normal(size=N)),
        "flag": pa.array(rng.random(N) < 0.3),
        "text": pa.array(words("1", "2", "x", "y")),
        "codes": pa.array(words("1", "2", "3")),
        "packed": pa.array(words("a", "b", "c")).dictionary_encode(),
        "stamp": pa.array(stamps.tolist(), pa.timestamp("ms", "Europe/Paris")),
        "day": pa.array(rng.integers(0, 9000, N).astype("datetime64[D]")),
        "money": pa.array(rng.integers(0, 999, N)).cast(pa.decimal128(21, 2)),
        "none": pa.nulls(N),
    }
    pq.write_table(pa.table(arrays), path)
    return path


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    source = parquet(tmp_path / "source.parquet")
    parts = read_table(source)
    kinds = [c.kind for c in parts[0].columns]
    assert kinds == "id integer number number boolean category category category date date integer constant".split()
    single = parts[0].columns[2]
    assert single.decimals == 3  # not the rounding errors of float32
    path = write_table(tmp_path / "out.parquet", parts[0].columns, all_values(parts))
    now, then = pq.read_table(path).drop_columns("key"), pq.read_table(source).drop_columns("key")
    assert now.schema.equals(then.schema) and now.equals(then)


def test_a_folder_has_its_own_held_out_part(tmp_path: Path) -> None:
    cells = every_kind()
    write_csv(tmp_path / "train.csv", {name: c[:300] for name, c in cells.items()})
    reordered = {name: c[300:] for name, c in reversed(cells.items())}  # the order of columns can differ
    reordered["grade"] = ["7", *reordered["grade"][1:]]
    write_csv(tmp_path / "test.csv", reordered)
    train, held = read_table(tmp_path)
    assert len(train) == 300 and len(held) == 100 and is_table(tmp_path)
    assert {c.name: c.kind for c in train.columns} == KINDS
    grade = [c.name for c in modelled(train.columns)].index("grade")
    assert train.columns[7].levels[-1] == "7" and held.values[0, grade] == 4


def test_categorical_and_exclude(tmp_path: Path) -> None:
    cells = [str(i % 40) for i in range(N)]
    assert infer_column(tmp_path, "hour", cells).kind == "integer"
    assert infer_column(tmp_path, "hour", cells, categorical=["hour"]).levels[0] == "0"
    data, _ = read_table(tmp_path / "t.csv", exclude=["hour"])
    assert [c.name for c in data.columns] == ["other"]


@pytest.mark.parametrize(
    ("name", "cells", "kind"),
    [
        ("age", [str(18 + i % 12) for i in range(N)], "integer"),  # counts stay counts
        ("grade", ["1", "2", "3", "4"] * 10, "category"),
        ("grade", [str(i % 8) for i in range(50)], "integer"),  # too few of each
        ("year", [str(1900 + i) for i in range(100)], "integer"),  # unique, but not a row number
        ("patient_id", [str(1900 + 3 * i) for i in range(100)], "id"),
        ("x", [str(i) for i in np.random.default_rng(0).permutation(100)], "id"),
        ("x", [f"{i:08x}-{i:04x}" for i in range(100)], "id"),
        ("x", ["9007199254740993"] * 50 + ["9007199254740995"] * 50, "category"),  # beyond the integers of float64
        ("x", [f"0{i % 30}" for i in range(100)], "category"),
        ("x", ["1", "0"] * 50, "boolean"),
        ("x", ["a", ""] * 50, "category"),
        ("x", [f"{i / 7:e}" for i in range(100)], "number"),
        ("x", [f" {i * i}" for i in range(100)], "integer"),
        ("x", [f"{1 + i % 12}/{1 + i % 28}/20{i % 10}{i % 7}" for i in range(100)], "date"),
    ],
)
def test_kinds_by_rule(tmp_path: Path, name: str, cells: list[str], kind: str) -> None:
    assert infer_column(tmp_path, name, cells).kind == kind


def test_over_represented_values_are_spikes() -> None:
    """Round sums among payments are, at most the most frequent ones; ages are not."""
    rng = np.random.default_rng(0)
    ages = rng.integers(18, 90, 20_000).astype(float)
    assert find_spikes(ages) == ([], True)
    paid = rng.lognormal(8, 1, 10_000).round()
    round_sums = np.repeat([0.0, 2_000.0, 5_000.0], [300, 200, 100])
    assert find_spikes(np.concatenate([paid, round_sums])) == ([0.0, 2_000.0, 5_000.0], True)
    assert find_spikes(np.concatenate([paid, round_sums[::MIN_SPIKE_ROWS]])) == ([], True)  # too few of each
    sums = 500.5 + 100 * np.arange(MAX_SPIKES + 10)
    many = np.repeat(sums, 60 + np.arange(len(sums)))
    assert find_spikes(np.concatenate([paid, many])) == (sums[10:].tolist(), True)  # the most frequent
    assert find_spikes(np.repeat([1.0, 2.0], 20)) == ([1.0, 2.0], False)


def test_notes(tmp_path: Path) -> None:
    columns = {"n": [str(i) for i in range(100)], "v": [str(i * i % 97) for i in range(100)], "k": ["1"] * 100}
    columns["d"] = [f"{1 + i % 12}/{1 + i % 12}/2020" for i in range(100)]
    columns["m"] = ["NA" if i % 9 == 0 else "?" if i % 5 == 0 else str(i * i) for i in range(100)]
    notes = "\n".join(read_table(write_csv(tmp_path / "t.csv", columns, ";"))[0].notes)
    assert "the delimiter is a semicolon" in notes and "new ones are numbered: 'n'" in notes
    assert "constant: 'k'" in notes and "'d': day and month are ambiguous; read as %m/%d/%Y" in notes
    assert "'m': missing cells are written in several ways, here all as '?'" in notes


def test_decimal_comma(tmp_path: Path) -> None:
    columns = {"a": [f"{i * 7 % 50},{i % 10}5" for i in range(50)], "b": words("x", "y", "z", count=50)}
    path = write_csv(tmp_path / "t.csv", columns, ";")
    data, _ = read_table(path)
    assert data.dialect == Dialect(";", ",") and data.store[1, 0] == 7.15
    again = write_table(tmp_path / "again.csv", data.columns, data.store, dialect=data.dialect)
    assert again.read_text() == path.read_text()


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    text = "é,b\r\n" + "".join(f"{i * i},{i % 3}\r\n" for i in range(60))
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [c.name for c in read_table(tmp_path / "t.csv")[0].columns] == ["é", "b"]


def test_batches_and_subsets(tmp_path: Path) -> None:
    data, held = read_table(write_csv(tmp_path / "t.csv", every_kind()))
    batch = data.batch([3, 1])
    assert batch.data.dtype == torch.float64 and batch.data.shape == (2, 12) and batch.index.tolist() == [3, 1]
    np.testing.assert_array_equal(batch.data.numpy(), data.values[[3, 1]])
    part = data.subset([5, 3, 1])
    np.testing.assert_array_equal(part.values, data.values[[5, 3, 1]])
    assert part.store is data.store and part.fingerprint == data.subset([5, 3, 1]).fingerprint != data.fingerprint
    assert [Column(**column) for column in data.spec["columns"]] == data.columns
    assert data.labels is data.captions is data.names is None and len(data.label_names) == 0
    again = read_table(tmp_path / "t.csv")
    assert [p.fingerprint for p in again] == [data.fingerprint, held.fingerprint]
    assert len(split(data, cap=7)[1]) == 7


def test_chunks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that looks like numbers in one chunk only, and a table that is mapped from disk."""
    cells = every_kind()
    cells["colour"] = words("1", "2", count=300) + words("x", "2001-01-01", count=100)
    path = write_csv(tmp_path / "t.csv", cells)
    parts = read_table(path)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(cache, "IN_MEMORY", 1000)
    again = read_table(path)
    assert again[0].columns == parts[0].columns and isinstance(again[0].store, np.memmap)
    np.testing.assert_array_equal(all_values(again), all_values(parts))
    assert again[0].fingerprint == parts[0].fingerprint


def test_samples_written_by_other_programs(tmp_path: Path) -> None:
    data, _ = read_table(write_csv(tmp_path / "t.csv", every_kind()))
    frame = column_frame(data.columns, data.store).drop(columns=["No", "unit"])
    frame["grade"] = frame["grade"].astype(float)
    frame["more"] = 1
    frame.loc[0, "colour"] = "unheard of"
    frame["day"], frame["seen"] = (
        frame[name].dt.strftime(f) for name, f in (("day", "%d.%m.%Y"), ("seen", "%Y-%m-%dT%H:%MZ"))
    )
    frame.to_csv(tmp_path / "samples.csv", index=False)
    samples = read_rows(tmp_path / "samples.csv", data.columns)
    assert np.isnan(samples.values[0, 8]) and not np.isnan(data.store[0, 8])
    np.testing.assert_array_equal(samples.values[1:], data.store[1:])
    notes = "\n".join(samples.notes)
    assert "ignored: 'more'" in notes and "read as missing: 'colour' (1)" in notes


def test_values_are_rounded_to_their_grid(tmp_path: Path) -> None:
    columns = [
        Column("n", "number", decimals=1),
        Column("i", "integer", decimals=0),
        Column("c", "category", ["x", "y"]),
        Column("d", "date", format="%Y-%m-%d", step=86400.0),
    ]
    values = np.array([[0.26, -1.7, 1.4, 86399.0], [1e20, 2.2, 9.0, -1.0], [np.nan] * 4])
    path = write_table(tmp_path / "t.csv", columns, values)
    assert path.read_text() == "n,i,c,d\n0.3,-2,y,1970-01-02\n1e+20,2,y,1970-01-01\n,,,\n"
    np.testing.assert_array_equal(read_rows(path, columns).values, round_values(columns, values))


def test_gzip_files_are_reproducible(tmp_path: Path) -> None:
    columns, values = [Column("n", "number")], np.arange(5.0)[:, None]
    files = [write_table(tmp_path / f"{i}.csv.gz", columns, values).read_bytes() for i in range(2)]
    assert files[0] == files[1] and gzip.decompress(files[0]).startswith(b"n\n0\n1\n")


def test_recognition(tmp_path: Path) -> None:
    assert is_table("x.csv") and is_table("X.TSV.GZ") and is_table("x.parquet")
    assert not is_table("mnist") and not is_table("x.npz") and not is_table(tmp_path)
    (tmp_path / "metadata.csv").write_text("a,b\n")
    (tmp_path / "0.png").touch()
    assert not is_table(tmp_path)
