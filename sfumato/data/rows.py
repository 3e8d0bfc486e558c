"""The rows of a CSV, TSV or Parquet file, piece by piece; and what is wrong with a file that is none."""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import StringIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import UserError
from .files import first_few
from .late import Late
from .spelling import NUMBER

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet
else:
    pa, arrow_csv, parquet = Late("pyarrow"), Late("pyarrow.csv"), Late("pyarrow.parquet")

TABLE = re.compile(r"\.((csv|tsv)(\.gz)?|parquet|pq)$", re.IGNORECASE)
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
HEAD = 2**18  # bytes that are looked at before reading
BLOCK = 2**23  # bytes of text held at a time
ROWS = 2**16  # rows of Parquet held at a time
YEARS = 1800, 2200  # names of columns that may be


@dataclass(frozen=True)
class Dialect:
    """How a text file separates its cells, and which mark its decimals have."""

    delimiter: str = ","
    decimal: str = "."


@dataclass(frozen=True)
class TableFile:
    """An opened table: the columns' names, their Arrow types where the file has them, and its rows as often as wanted.

    Columns that `check_readable` refuses are as they stand in the file: lists, times and so on.

    Args:
        path: The file.
        names: The header.
        dtypes: Arrow type of each column; None for each column of a text file.
        dialect: Of a text file.
        pieces: Yields the rows as one array per column: texts, or float64.
        unreadable: The columns that are neither texts nor numbers nor dates.
    """

    path: Path
    names: list[str]
    dtypes: list[str | None]
    dialect: Dialect
    pieces: Callable[[], Iterator[list[pa.Array]]]
    unreadable: frozenset[str] = frozenset()


def open_table(path: Path) -> TableFile:
    """Look at a table without reading its rows.

    Raises:
        UserError: It is no table, or has no header, or a header that will not do.
    """
    try:
        file = _open_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _open_text(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file whole?", code=1) from error
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); is a quote left open?", code=1) from error
    twice = sorted({name for name in file.names if file.names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two columns are called {first_few(map(repr, twice))}; rename one", code=1)
    return file


def check_readable(file: TableFile, names: Collection[str]) -> None:
    """Raise when one of these columns holds what no column of a table can be."""
    for name, dtype in zip(file.names, file.dtypes, strict=True):
        if name in file.unreadable and name in names:
            advice = f"leave it out, or save it as numbers, texts or dates (--exclude {name} leaves it out)"
            raise UserError(f"{file.path}: column {name!r} holds {dtype}; {advice}", code=1)


# -- text


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path) -> TableFile:
    with _opened(path) as file:
        raw = file.read(HEAD)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8", code=1)
    try:
        head = codecs.getincrementaldecoder("utf-8-sig")().decode(raw)
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    if not head.strip():
        raise UserError(f"{path}: is empty; want a header and one row per line", code=1)
    delimiter = _delimiter(head, path)
    names, *rows = _few_rows(head, delimiter)
    _check_header(names, rows, path)
    dialect = Dialect(delimiter, _decimal(rows, delimiter))
    return TableFile(path, names, [None] * len(names), dialect, lambda: _text_pieces(path, names, delimiter))


def _few_rows(head: str, delimiter: str) -> list[list[str]]:
    """The header and up to 200 rows (the last one may be cut short)."""
    rows = csv.reader(StringIO(head), delimiter=delimiter)
    return list(islice((row for row in rows if row), 201))


def _delimiter(head: str, path: Path) -> str:
    """The delimiter under which most rows have as many cells as the header, and it several."""
    scores: dict[str, tuple[float, int]] = {}
    for mark in DELIMITERS:
        counts = [len(row) for row in _few_rows(head, mark)]
        if counts[0] > 1:
            scores[mark] = (sum(count == counts[0] for count in counts) / len(counts), counts[0])
    if not scores:
        advice = f"want cells separated by {', '.join(DELIMITERS.values())}"
        raise UserError(f"{path}: has one column only ({head.splitlines()[0][:40]!r}); {advice}", code=1)
    return max(scores, key=lambda mark: scores[mark])


def _check_header(names: list[str], rows: list[list[str]], path: Path) -> None:
    """Raise when the first line holds data rather than names."""
    named = [name for name in names if name.strip()]
    numeric = [name for name in named if re.match(NUMBER, name.strip())]
    if _counted(numeric):
        named, numeric = [name for name in named if name not in numeric], []
    cells = zip(*(row for row in rows if len(row) == len(names)), strict=True)
    repeated = [name for name, column in zip(names, cells, strict=False) if name in named and name in column]
    # a name that is also a cell below it, twice or beside a number: that line is data too
    if (named and len(numeric) == len(named)) or (numeric and repeated) or len(repeated) > 1:
        found = ",".join(names)
        raise UserError(f"{path}: has no header (line 1 is {found[:60]!r}); write the columns' names there", code=1)


def _counted(names: list[str]) -> bool:
    """Whether names are whole numbers that run on by one, from 0 or 1, or years: the columns were counted."""
    numbers = [int(name) for name in names if re.fullmatch(r" *\d{1,6} *", name)]
    runs = len(numbers) == len(names) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return runs and (numbers[0] in (0, 1) or YEARS[0] <= numbers[0] <= numbers[-1] <= YEARS[1])


def _decimal(rows: list[list[str]], delimiter: str) -> str:
    """The decimal mark: a comma where the delimiter is another and no number has a point, but between thousands."""
    cells = [cell.strip() for row in rows for cell in row]
    plain = [cell for cell in cells if not re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})+", cell)]  # maybe between thousands
    comma, point = (any(re.fullmatch(rf"[+-]?\d*{mark}\d+", cell) for cell in plain) for mark in (",", r"\."))
    return "," if delimiter != "," and comma and not point else "."


def _text_pieces(path: Path, names: list[str], delimiter: str) -> Iterator[list[pa.Array]]:
    read = arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK)
    parse = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, quoted_strings_can_be_null=False
    )
    try:
        with _opened(path) as file, arrow_csv.open_csv(file, read, parse, convert) as reader:
            for piece in reader:
                yield piece.columns
    except pa.ArrowInvalid as error:
        raise _complaint(path, len(names), delimiter, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); is the file whole?", code=1) from error


def _complaint(path: Path, width: int, delimiter: str, error: pa.ArrowInvalid) -> UserError:
    """What is wrong with a text file, and in which line."""
    if "UTF8" in str(error):
        return _not_utf8(path)
    first = 1
    with _opened(path) as file, suppress(csv.Error):
        rows = csv.reader(TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
        for row in rows:
            if row and len(row) != width:
                found = f"{len(row)} cell{'s' * (len(row) != 1)} where the header has {width}"
                return UserError(f"{path}: line {first} has {found}; correct it, or quote the text in it", code=1)
            first = rows.line_num + 1
        first = 0
    if first:
        return UserError(f"{path}: cannot be read from line {first} on; is a quote left open there?", code=1)
    return UserError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})", code=1)


def _not_utf8(path: Path) -> UserError:
    """Where a file stops being UTF-8."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = f"line {number}, byte {error.start + 1} (0x{line[error.start]:02x})"
                return UserError(f"{path}: {place} is not UTF-8; save the file as UTF-8", code=1)
    return UserError(f"{path}: is not UTF-8; save the file as UTF-8", code=1)


# -- Parquet


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file, or a damaged one ({found})", code=1) from error


def _open_parquet(path: Path) -> TableFile:
    with _parquet_errors(path), parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
    if len(schema) == 1:
        raise UserError(f"{path}: has one column only ({schema.names[0]!r}); a table needs several", code=1)
    unreadable = frozenset(field.name for field in schema if not _readable(field.type))
    dtypes: list[str | None] = [str(kind) for kind in schema.types]
    return TableFile(path, schema.names, dtypes, Dialect(), lambda: _parquet_pieces(path), unreadable)


def _parquet_pieces(path: Path) -> Iterator[list[pa.Array]]:
    with _parquet_errors(path), parquet.ParquetFile(path) as file:
        for piece in file.iter_batches(batch_size=ROWS):
            yield [plain(cells) if _readable(cells.type) else cells for cells in piece.columns]


def is_text(kind: pa.DataType) -> bool:
    """Whether it is one of Arrow's types of texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _readable(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = (
        pa.types.is_boolean(kind),
        pa.types.is_integer(kind),
        pa.types.is_floating(kind),
        pa.types.is_decimal(kind),
        is_text(kind),
        pa.types.is_timestamp(kind) or pa.types.is_date(kind),
        pa.types.is_null(kind),
    )
    return any(known)


def plain(cells: pa.Array) -> pa.Array:
    """Cells of any type as texts or float64: dates in seconds, short floats by their shortest decimals."""
    if pa.types.is_dictionary(cells.type):
        return plain(cells.dictionary_decode())
    kind = cells.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = cells.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pa.array(micros.to_numpy(zero_copy_only=False) / 1e6, pa.float64(), from_pandas=True)
    if kind in (pa.float32(), pa.float16()):
        return cells.cast(pa.float32()).cast(pa.string()).cast(pa.float64())
    if pa.types.is_integer(kind):
        try:
            return cells.cast(pa.float64())
        except pa.ArrowInvalid:  # over 2^53: names rather than numbers
            return cells.cast(pa.string())
    return cells.cast(pa.float64() if kind == pa.float64() or pa.types.is_decimal(kind) else pa.string())


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type that `str` gave this name."""
    zone = re.fullmatch(r"timestamp\[(\w+), tz=(.+)\]", name)
    if zone:
        return pa.timestamp(zone[1], zone[2])
    decimal = re.fullmatch(r"decimal(\d+)\((\d+), (-?\d+)\)", name)
    if decimal:
        return getattr(pa, f"decimal{decimal[1]}")(int(decimal[2]), int(decimal[3]))
    packed = re.fullmatch(r"dictionary<values=(.+), indices=(\w+), ordered=\d>", name)
    if packed:
        return pa.dictionary(pa.type_for_alias(packed[2]), arrow_type(packed[1]))
    return pa.type_for_alias(name)
