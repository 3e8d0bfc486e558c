"""A one-line error for each invalid table: the problem, its position and the remedy."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.config import DataSettings
from sfumato.errors import UserError
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.modality import TableModality
from sfumato.modalities.table.read import read_rows, read_table
from sfumato.modalities.table.write import write_table

ROWS = [f"{i * i % 89},{'xyz'[i % 3]},{i / 7:.3f}" for i in range(60)]
GOOD = "\n".join(["a,b,c", *ROWS]) + "\n"


def lines(*changes: tuple[int, str], header: str = "a,b,c") -> str:
    """The good table with some lines (counted from 1) replaced."""
    text = [header, *ROWS]
    for number, line in changes:
        text[number - 1] = line
    return "\n".join(text) + "\n"


def column(cells: list[str], name: str = "t") -> str:
    return "\n".join([f"a,{name}", *(f"{i * i % 89},{cell}" for i, cell in enumerate(cells))]) + "\n"


SENTENCES = [f"this is the story of number {i} and of {i * i}" for i in range(60)]

BAD = {
    "ragged": (lines((17, "1,x,2,3")), "line 17 has 4 cells where the header has 3; correct it"),
    "short": (lines((3, '1,"x\ny",2'), (18, "1,x")), "line 19 has 2 cells where the header has 3"),
    "one column": ("a\n" + "1\n" * 50, r"only one column \('a'\); expected cells separated by a comma, a semicolon"),
    "twice": (lines(header="a,b,a"), "two columns are called 'a'; rename one"),
    "constant": ("a,b\n" + "1,x\n" * 50, r"no column can be modelled \(2 constant, 0 ids\)"),
    "few": ("\n".join(["a,b,c", *ROWS[:19]]), "has 19 rows; at least 20 rows are needed"),
    "no rows": ("a,b,c\n", "has 0 rows"),
    "empty": ("", "is empty; expected a header and one row per line"),
    "blank": ("\n \n", "is empty"),
    "no header": ("\n".join(["1,2.5,-3", *(f"{i},{i}.5,{-i}" for i in range(60))]), "no header .line 1 is '1,2.5,-3'"),
    "no header, with words": ("\n".join(["39,x,y", *(f"{i},x,y" for i in range(60))]), "has no header"),
    "sentences": (column(SENTENCES), "column 't' holds 60 different texts in 60 cells, too many; leave the column out"),
    "nearly numbers": (
        column([f"{i * 1.7:.2f}" for i in range(59)] + ["12,5kg".replace(",", ".")]),
        "column 't' holds numbers, and also '12.5kg'; correct that cell, leave it empty",
    ),
    "infinite": (column(["inf", *(str(i * 3) for i in range(59))]), "'t' holds an infinite number"),
    "open quote": (lines((30, '1,"x,2')), "cannot be read as a table|line 30 has"),
}  # fmt: skip


def error_of(path: Path, text: str | bytes, **options: object) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        read_table(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and error.value.code in (1, 2)
    return message


def test_the_unchanged_table_is_valid(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    assert [c.kind for c in read_table(tmp_path / "t.csv")[0].columns] == ["integer", "category", "number"]


@pytest.mark.parametrize("name", BAD)
def test_invalid_text_files(tmp_path: Path, name: str) -> None:
    text, expected = BAD[name]
    assert re.search(expected, error_of(tmp_path / "t.csv", text))


def test_not_utf8(tmp_path: Path) -> None:
    latin = lines((40, "1,café,2")).encode("latin-1")
    expected = r"line 40, byte 6 \(0xe9\) is not UTF-8; save the file as UTF-8"
    assert re.search(expected, error_of(tmp_path / "t.csv", latin))
    assert re.search(expected, error_of(tmp_path / "t.csv.gz", gzip.compress(latin)))
    assert "is UTF-16; save it as UTF-8" in error_of(tmp_path / "t.csv", GOOD.encode("utf-16"))


def test_invalid_utf8_in_a_late_line(tmp_path: Path) -> None:
    many = GOOD + "\n".join(ROWS * 500) + "\n1,café,2\n"
    assert "line 30062, byte 6 (0xe9)" in error_of(tmp_path / "t.csv", many.encode("latin-1"))


def test_open_quotes_in_long_files(tmp_path: Path) -> None:
    many = "\n".join(ROWS * 1000) + "\n"
    assert "is a quote left open?" in error_of(tmp_path / "t.csv", 'a,b,c\n1,"x,2\n' + many)
    late = "a,b,c\n" + many * 4 + '1,"x,2\n' + many
    assert "cannot be read from line 240002 on; is a quote left open there?" in error_of(tmp_path / "t.csv", late)


def test_damaged_files(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(tmp_path / "t.csv.gz", gzip.compress(GOOD.encode())[:-40])
    assert "cannot be read" in error_of(tmp_path / "t.csv.gz", b"no gzip")
    assert "not a Parquet file, or a damaged one" in error_of(tmp_path / "t.parquet", b"PAR1 and so on")
    assert "not a Parquet file" in error_of(tmp_path / "t.parquet", b"")


def test_parquet_that_is_not_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": list(range(30)), "b": [[i] for i in range(30)]}), path)
    with pytest.raises(
        UserError, match=r"column 'b' holds list<.*; exclude it \(--exclude b\), or save it as numbers, texts or dates"
    ):
        read_table(path)
    pq.write_table(pa.table({"a": list(range(30))}), path)
    with pytest.raises(UserError, match=r"has only one column \('a'\)"):
        read_table(path)


def test_unknown_names(tmp_path: Path) -> None:
    assert "categorical: no column 'bb'; did you mean 'b'?" in error_of(tmp_path / "t.csv", GOOD, categorical=["bb"])
    assert "exclude: no column 'B'" in error_of(tmp_path / "t.csv", GOOD, exclude=["a", "B"])
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(UserError, match=r"not a table; expected \.csv"):
        read_table(Path(__file__))


def test_columns_of_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    settings, columns = DataSettings(label_column=("a", "b")), read_table(tmp_path / "t.csv")[0].spec
    for read in (TableModality().read, TableModality().read_split):
        for spec in (None, columns):
            with pytest.raises(UserError, match=r"--label-column a,b: is for images; .* all learned$"):
                read(str(tmp_path / "t.csv"), settings, spec)


def test_category_with_too_many_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.modalities.table.infer.MAX_LEVELS", 50)
    text = column([str(i * 7) for i in range(60)])
    assert "more than 50 different texts: too many for a category" in error_of(
        tmp_path / "t.csv", text, categorical=["t"]
    )


def test_invalid_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train.csv \(or .tsv, .parquet\) here, found nothing"):
        read_table(tmp_path)
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "test.csv").write_text(lines(header="a,b,d"))
    with pytest.raises(UserError, match=r"test.csv: has other columns than train.csv: 'c', 'd'; both need the same"):
        read_table(tmp_path)
    (tmp_path / "test.csv").write_text("a,b,c\n")
    with pytest.raises(UserError, match=r"test.csv: has 0 rows; at least one row is needed"):
        read_table(tmp_path)


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    columns = [Column("a", "integer", decimals=0), Column("e", "number")]
    (tmp_path / "t.csv").write_text(GOOD)
    with pytest.raises(UserError, match="lacks the column 'e'"):
        read_rows(tmp_path / "t.csv", columns)
    with pytest.raises(UserError, match=r"column 'b' should hold numbers .*'[xyz]'"):
        read_rows(tmp_path / "t.csv", [Column("b", "number")])


def test_refused_outputs(tmp_path: Path) -> None:
    columns, values = [Column("a", "number")], np.arange(3.0)[:, None]
    with pytest.raises(UserError, match=r"not the name of a table; expected \.csv"):
        write_table(tmp_path / "x.xlsx", columns, values)
    path = write_table(tmp_path / "deep" / "x.csv", columns, values)
    with pytest.raises(UserError, match="exists; pass --overwrite"):
        write_table(path, columns, values)
    with pytest.raises(UserError, match="infinite numbers; nothing written"):
        write_table(path, columns, values + np.inf, overwrite=True)
    assert path.read_text() == "a\n0\n1\n2\n"
    write_table(path, columns, -values, overwrite=True)
    assert path.read_text() == "a\n0\n-1\n-2\n" and [p.name for p in path.parent.iterdir()] == ["x.csv"]
    with pytest.raises(UserError, match="cannot be written"):
        write_table("/proc/sfumato/x.csv", columns, values)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "x.csv", [Column("a", "number")], np.arange(3.0)[:, None])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfumato.modalities.table.write._write_lines", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        write_table(path, [Column("a", "number")], np.zeros((3, 1)), overwrite=True)
    assert path.read_text() == "a\n0\n1\n2\n" and [p.name for p in tmp_path.iterdir()] == ["x.csv"]
