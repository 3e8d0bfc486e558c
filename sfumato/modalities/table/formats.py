"""CSV, TSV and Parquet files, read chunk by chunk; and error messages for files that are no tables."""

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

from sfumato.data.files import first_few
from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.numbers import NUMBER

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet
else:
    pa, arrow_csv, parquet = LazyModule("pyarrow"), LazyModule("pyarrow.csv"), LazyModule("pyarrow.parquet")

TABLE_SUFFIX = re.compile(r"\.((csv|tsv)(\.gz)?|parquet|pq)$", re.IGNORECASE)
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
HEAD_BYTES = 2**18  # start of a text file, from which the delimiter, header and decimal mark are inferred
HEAD_ROWS = 200  # rows of that start that are parsed
BLOCK_BYTES = 2**23  # text per chunk
PARQUET_BATCH_ROWS = 2**16  # Parquet rows per chunk
YEAR_RANGE = 1800, 2200  # first and last integer that counts as a year in a header


@dataclass(frozen=True)
class Dialect:
    """Delimiter and decimal mark of a text file."""

    delimiter: str = ","
    decimal: str = "."


@dataclass(frozen=True)
class TableFile:
    """An opened table: header, column types and an iterator over its rows.

    Args:
        path: The file.
        names: The header.
        dtypes: Arrow type of each column; None for each column of a text file.
        dialect: Dialect of a text file.
        chunks: Yields the rows as one array per column: texts, or float64; unreadable columns unchanged.
        unreadable: Columns that are neither texts nor numbers nor dates, such as lists.
    """

    path: Path
    names: list[str]
    dtypes: list[str | None]
    dialect: Dialect
    chunks: Callable[[], Iterator[list[pa.Array]]]
    unreadable: frozenset[str] = frozenset()


def open_table(path: Path) -> TableFile:
    """Open a table: read its header, not its rows.

    Raises:
        UserError: The file is not a table, or has no valid header.
    """
    try:
        file = _open_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _open_text(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file complete?", code=1) from error
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); is a quote left open?", code=1) from error
    repeated = sorted({name for name in file.names if file.names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: two columns are called {first_few(map(repr, repeated))}; rename one", code=1)
    return file


def check_readable(file: TableFile, names: Collection[str]) -> None:
    """Raise if one of these columns is unreadable."""
    for name, dtype in zip(file.names, file.dtypes, strict=True):
        if name in file.unreadable and name in names:
            advice = f"exclude it (--exclude {name}), or save it as numbers, texts or dates"
            raise UserError(f"{file.path}: column {name!r} holds {dtype}; {advice}", code=1)


# -- text files


def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path) -> TableFile:
    with _open_bytes(path) as file:
        raw = file.read(HEAD_BYTES)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8", code=1)
    try:
        head = codecs.getincrementaldecoder("utf-8-sig")().decode(raw)
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    if not head.strip():
        raise UserError(f"{path}: is empty; expected a header and one row per line", code=1)
    delimiter = _delimiter(head, path)
    names, *rows = _first_rows(head, delimiter)
    _check_header(names, rows, path)
    dialect = Dialect(delimiter, _decimal(rows, delimiter))
    return TableFile(path, names, [None] * len(names), dialect, lambda: _text_chunks(path, names, delimiter))


def _first_rows(head: str, delimiter: str) -> list[list[str]]:
    """The header and up to `HEAD_ROWS` rows (the last one may be cut short)."""
    rows = csv.reader(StringIO(head), delimiter=delimiter)
    return list(islice((row for row in rows if row), 1 + HEAD_ROWS))


def _delimiter(head: str, path: Path) -> str:
    """The delimiter that gives most rows as many cells as the header, which must have several."""
    scores: dict[str, tuple[float, int]] = {}
    for delimiter in DELIMITERS:
        counts = [len(row) for row in _first_rows(head, delimiter)]
        if counts[0] > 1:
            scores[delimiter] = (sum(count == counts[0] for count in counts) / len(counts), counts[0])
    if not scores:
        advice = f"expected cells separated by {', '.join(DELIMITERS.values())}"
        raise UserError(f"{path}: has only one column ({head.splitlines()[0][:40]!r}); {advice}", code=1)
    return max(scores, key=lambda delimiter: scores[delimiter])


def _check_header(names: list[str], rows: list[list[str]], path: Path) -> None:
    """Raise if the first line looks like data."""
    named = [name for name in names if name.strip()]
    numeric = [name for name in named if re.match(NUMBER, name.strip())]
    if _enumerated(numeric):
        named, numeric = [name for name in named if name not in numeric], []
    cells = zip(*(row for row in rows if len(row) == len(names)), strict=True)
    repeated = [name for name, column in zip(names, cells, strict=False) if name in named and name in column]
    # several names that are also cells of their columns, or one beside a number: the first line is data
    if (named and len(numeric) == len(named)) or (numeric and repeated) or len(repeated) > 1:
        line = ",".join(names)
        raise UserError(f"{path}: has no header (line 1 is {line[:60]!r}); add the column names there", code=1)


def _enumerated(names: list[str]) -> bool:
    """Whether names are consecutive integers from 0 or 1, or consecutive years."""
    numbers = [int(name) for name in names if re.fullmatch(r" *\d{1,6} *", name)]
    consecutive = len(numbers) == len(names) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return consecutive and (numbers[0] in (0, 1) or YEAR_RANGE[0] <= numbers[0] <= numbers[-1] <= YEAR_RANGE[1])


def _decimal(rows: list[list[str]], delimiter: str) -> str:
    """The decimal mark: a comma if it is not the delimiter and points occur only as thousands separators."""
    cells = [cell.strip() for row in rows for cell in row]
    ungrouped = [cell for cell in cells if not re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})+", cell)]
    comma, point = (any(re.fullmatch(rf"[+-]?\d*{mark}\d+", cell) for cell in ungrouped) for mark in (",", r"\."))
    return "," if delimiter != "," and comma and not point else "."


def _text_chunks(path: Path, names: list[str], delimiter: str) -> Iterator[list[pa.Array]]:
    read = arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    parse = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, quoted_strings_can_be_null=False
    )
    try:
        with _open_bytes(path) as file, arrow_csv.open_csv(file, read, parse, convert) as reader:
            for batch in reader:
                yield batch.columns
    except pa.ArrowInvalid as error:
        raise _parse_error(path, len(names), delimiter, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read to the end ({error}); is the file complete?", code=1) from error


def _parse_error(path: Path, width: int, delimiter: str, error: pa.ArrowInvalid) -> UserError:
    """The cause of a parse error and its line number."""
    if "UTF8" in str(error):
        return _not_utf8(path)
    line = 1  # of the row that is read next
    with _open_bytes(path) as file, suppress(csv.Error):
        rows = csv.reader(TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
        for row in rows:
            if row and len(row) != width:
                found = f"{len(row)} cell{'s' * (len(row) != 1)} where the header has {width}"
                return UserError(f"{path}: line {line} has {found}; correct it, or quote the text in it", code=1)
            line = rows.line_num + 1
        line = 0  # no row is malformed
    if line:
        return UserError(f"{path}: cannot be read from line {line} on; is a quote left open there?", code=1)
    return UserError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})", code=1)


def _not_utf8(path: Path) -> UserError:
    """The position of the first byte that is not UTF-8."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                position = f"line {number}, byte {error.start + 1} (0x{line[error.start]:02x})"
                return UserError(f"{path}: {position} is not UTF-8; save the file as UTF-8", code=1)
    return UserError(f"{path}: is not UTF-8; save the file as UTF-8", code=1)


# -- Parquet


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file, or a damaged one ({reason})", code=1) from error


def _open_parquet(path: Path) -> TableFile:
    with _parquet_errors(path), parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
    if len(schema) == 1:
        raise UserError(f"{path}: has only one column ({schema.names[0]!r}); a table needs at least two", code=1)
    unreadable = frozenset(field.name for field in schema if not _readable(field.type))
    dtypes: list[str | None] = [str(kind) for kind in schema.types]
    return TableFile(path, schema.names, dtypes, Dialect(), lambda: _parquet_chunks(path), unreadable)


def _parquet_chunks(path: Path) -> Iterator[list[pa.Array]]:
    with _parquet_errors(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            yield [to_text_or_float(cells) if _readable(cells.type) else cells for cells in batch.columns]


def is_string_type(kind: pa.DataType) -> bool:
    """Whether it is one of Arrow's string types."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _readable(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    readable = (
        pa.types.is_boolean(kind),
        pa.types.is_integer(kind),
        pa.types.is_floating(kind),
        pa.types.is_decimal(kind),
        is_string_type(kind),
        pa.types.is_timestamp(kind) or pa.types.is_date(kind),
        pa.types.is_null(kind),
    )
    return any(readable)


def to_text_or_float(cells: pa.Array) -> pa.Array:
    """Cells of any type as texts or float64: dates in seconds, float32 by its shortest decimal text."""
    if pa.types.is_dictionary(cells.type):
        return to_text_or_float(cells.dictionary_decode())
    kind = cells.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = cells.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pa.array(micros.to_numpy(zero_copy_only=False) / 1e6, pa.float64(), from_pandas=True)
    if kind in (pa.float32(), pa.float16()):
        return cells.cast(pa.float32()).cast(pa.string()).cast(pa.float64())
    if pa.types.is_integer(kind):
        try:
            return cells.cast(pa.float64())
        except pa.ArrowInvalid:  # over 2^53: ids rather than numbers
            return cells.cast(pa.string())
    return cells.cast(pa.float64() if kind == pa.float64() or pa.types.is_decimal(kind) else pa.string())


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type whose `str` is this name."""
    zone = re.fullmatch(r"timestamp\[(\w+), tz=(.+)\]", name)
    if zone:
        return pa.timestamp(zone[1], zone[2])
    decimal = re.fullmatch(r"decimal(\d+)\((\d+), (-?\d+)\)", name)
    if decimal:
        return getattr(pa, f"decimal{decimal[1]}")(int(decimal[2]), int(decimal[3]))
    dictionary = re.fullmatch(r"dictionary<values=(.+), indices=(\w+), ordered=\d>", name)
    if dictionary:
        return pa.dictionary(pa.type_for_alias(dictionary[2]), arrow_type(dictionary[1]))
    return pa.type_for_alias(name)
