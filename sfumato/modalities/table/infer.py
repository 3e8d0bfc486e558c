"""Schema inference: the type and format of a column from its cells.

The rules, in this order (`ColumnInference.column`):

1. All cells missing, or one text and none missing: a constant.
2. Two texts that are a pair such as false/true, no/yes, 0/1 (in one spelling): a boolean.
3. Declared by the user as a category or as numbers: that.
4. All numbers: integers are an id if they are unique and are 1..n (or 0..n-1) in any order or have a name such as id;
   a category if there are at most 10 of them, each in 10 rows on average; else integers. The others are numbers. Codes
   with leading zeros, and integers above 2^53, are texts. Numbers may have a percent sign, a currency, a unit, a
   decimal comma or a thousands separator, if all cells have the same format.
5. All dates, or times of day, in one of the known formats: a date.
6. Unique texts without missing cells, at most 64 characters and not sentences: an id.
7. At most 10,000 texts, each in two rows on average: a category. Rare ones stay.
8. Anything else is refused. Before rule 6, a column with more than 20 texts is refused if nearly all look like numbers
   or dates.

Cells such as NA are missing, except in categories: there only one such text is (`missing_text`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfumato.errors import UserError
from sfumato.lazy import LazyModule
from sfumato.modalities.table.columns import MISSING_MARKERS, Column, Values, missing_mask
from sfumato.modalities.table.dates import (
    DATE_FORMATS,
    FRACTION,
    MINUTE_STEP,
    STEPS,
    UNPADDED,
    UTC_OFFSET,
    coarsest_step,
    find_non_date,
    format_dates,
    matches_format,
    parse_dates,
)
from sfumato.modalities.table.numbers import (
    INTEGER,
    NUMBER,
    NUMBER_LIKE,
    ZERO_PADDED,
    NumberFormat,
    candidate_formats,
    fewest_decimals,
    format_number,
    parse_numbers,
    pc,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
else:
    pa, pd = LazyModule("pyarrow"), LazyModule("pandas")

MAX_LEVELS = 10_000  # levels of a category
MAX_INTEGER_LEVELS = 10  # distinct integers, each in as many rows on average, that are taken for classes
MAX_ID_LENGTH = 64  # characters
CORRECT_CELL = "correct that cell, leave it empty, or name the column in --categorical or --exclude"
BOOLEAN_PAIRS = (("false", "true"), ("no", "yes"), ("f", "t"), ("n", "y"), ("off", "on"), ("0", "1"), ("0.0", "1.0"))
ID_NAME = re.compile(
    r"(^|[^a-z])(id|no|nr|index|key|row|rowid|row_?num(ber)?|uuid|guid)$|^unnamed: 0$|^__index_level_\d+__$|^$",
    re.IGNORECASE,
)
KindOverride = Literal["category", "number"]  # what a user can declare a column to be


class ColumnInference:
    """Statistics of one column, collected chunk by chunk, and the type that follows from them.

    Args:
        name: As in the header.
        path: The file, for messages.
        dtype: Arrow type in a Parquet source.
        decimal: Decimal mark of a text file.
    """

    def __init__(self, name: str, path: object, dtype: str | None = None, decimal: str = ".") -> None:
        self.name, self.location, self.dtype = name, f"{path}: column {name!r}", dtype
        self.rows, self.nulls, self.markers = 0, 0, Counter[str]()  # markers: texts of missing cells
        self.levels: Counter[str] | None = Counter()  # None: too many
        self.hashes: list[NDArray[np.uint64]] | None = []  # of the cells of one file; None: not unique, or some missing
        self.table_format = NumberFormat(decimal)
        self.number_formats = [self.table_format]  # those that all numbers so far match
        self.formatted_example = ""  # the first number in another format than the table's
        self.point, self.decimals, self.low, self.high = True, 0, np.inf, -np.inf
        self.digits: int | None = None  # decimals of every number: None before the first, 0 if they vary
        self.numeric_count, self.number_like_count, self.non_number = 0, 0, ""  # non_number: the first such text
        self.date_formats, self.step = list(DATE_FORMATS), 0
        self.offsets = set[str]()  # UTC offsets of times
        self.bare = set[str]()  # keys of `UNPADDED` that occur without a leading zero
        self.date_mismatches = dict[str, str]()  # format -> the first text that does not match it
        self.date_format: str | None = None  # of dates in Parquet
        self.max_length, self.spaces, self.sample = 0, 0, list[str]()

    def add(self, cells: pa.Array) -> None:
        """Add the next cells (N,): texts, or float64."""
        missing = missing_mask(cells)
        present = cells.filter(pc.invert(missing))
        self.rows += len(cells)
        if len(present) < len(cells):
            markers = cells.filter(missing)
            markers = markers.slice(0, 0) if pa.types.is_floating(cells.type) else markers.drop_null()
            self.nulls += len(cells) - len(present) - len(markers)
            self.markers.update({item["values"]: item["counts"] for item in markers.value_counts().to_pylist()})
        if len(present):
            counted = present.value_counts()
            distinct, counts = counted.field("values"), counted.field("counts")
            self._count(distinct, counts, len(present) == len(distinct) == len(cells))
            self._narrow(distinct, counts)

    @property
    def complete(self) -> bool:
        """Whether no cell is missing."""
        return not self.nulls and not self.markers

    @property
    def missing(self) -> str | None:
        """The most frequent text of a missing cell: "" for nulls of Parquet."""
        return None if self.complete else "" if self.dtype else self._most_frequent(self.markers)

    @property
    def missing_text(self) -> str | None:
        """Text of a missing category: null in Parquet; in text files an empty cell or, without these, a marker."""
        if self.dtype:
            return "" if self.nulls else None
        markers = [text for text in self.markers if text.strip().lower() in MISSING_MARKERS]
        return self._most_frequent([text for text in markers if not text.strip()] or markers)

    def _most_frequent(self, markers: Iterable[str]) -> str | None:
        return min(markers, key=lambda text: (-self.markers[text], text), default=None)

    @property
    def unique(self) -> bool:
        """Whether the cells of each file are distinct, and none is missing."""
        return self.hashes is not None and self.complete

    def _count(self, distinct: pa.Array, counts: pa.Array, unique: bool) -> None:
        if unique and self.hashes is not None:
            self.hashes.append(pd.util.hash_array(distinct.to_numpy(zero_copy_only=False)))  # type: ignore[operator]
        else:
            self.hashes = None
        if self.levels is None or len(distinct) > MAX_LEVELS:
            self.levels = None
            return
        texts = (v if isinstance(v, str) else format_number(v) for v in distinct.to_pylist())
        self.levels.update(dict(zip(texts, counts.to_pylist(), strict=True)))
        self.levels = self.levels if len(self.levels) <= MAX_LEVELS else None

    def end_file(self) -> None:
        """Mark the end of a file, and check that its cells are unique."""
        if self.hashes:
            hashes = np.concatenate(self.hashes)
            self.hashes = [] if len(np.unique(hashes)) == len(hashes) else None

    def _narrow(self, distinct: pa.Array, counts: pa.Array) -> None:
        """Drop the types and formats that these texts or numbers rule out."""
        if pa.types.is_floating(distinct.type):
            self.point = self.dtype is not None and not self.dtype.startswith(("int", "uint"))
            self._add_numbers(distinct.to_numpy(zero_copy_only=False))
            return
        trimmed = pc.utf8_trim_whitespace(distinct)
        if self._narrow_numbers(trimmed):
            self.date_formats.clear()
            self.numeric_count += pc.sum(counts).as_py()
            return
        numeric, number_like = (
            pc.match_substring_regex(trimmed, pattern)
            for pattern in (NUMBER.replace(r"\.", re.escape(self.table_format.decimal)), NUMBER_LIKE)
        )
        self.numeric_count += pc.sum(pc.if_else(numeric, counts, 0)).as_py()
        self.number_like_count += pc.sum(pc.if_else(pc.and_not(number_like, numeric), counts, 0)).as_py()
        if self.number_formats:
            self.number_formats = []
            self.non_number = next(iter(trimmed.filter(pc.invert(numeric)).to_pylist()), "")
        self._narrow_dates(trimmed)
        self.sample = self.sample or trimmed[:1000].to_pylist()
        self.max_length = max(self.max_length, pc.max(pc.utf8_length(distinct)).as_py())
        self.spaces += pc.sum(pc.count_substring(trimmed, " ")).as_py()

    def _narrow_numbers(self, trimmed: pa.Array) -> bool:
        """Whether all are numbers of one format; if so, update their grid and range."""
        if not self.number_formats or pc.any(pc.match_substring_regex(trimmed, ZERO_PADDED)).as_py():
            return False
        values = self._parse_numbers(trimmed)
        if values is None:
            return False
        if np.abs(values).max() > 2**53 and pc.all(pc.match_substring_regex(trimmed, INTEGER)).as_py():
            return False
        mark = re.escape(self.number_formats[0].decimal)
        self.point = self.point and pc.all(pc.match_substring_regex(trimmed, rf"{mark}|\d[eE]")).as_py()
        decimals = re.search(rf"{mark}(\d+)\D*$", trimmed[0].as_py())
        digits = len(decimals[1]) if decimals else 0
        same = digits and pc.all(pc.match_substring_regex(trimmed, rf"{mark}\d{{{digits}}}\D*$")).as_py()
        self.digits = digits if same and self.digits in (None, digits) else 0
        self._add_numbers(values)
        return True

    def _parse_numbers(self, trimmed: pa.Array) -> Values | None:
        """The texts as numbers, in a format that all numbers so far match; None if there is none."""
        formats = self.number_formats
        if formats == [self.table_format]:
            if self.table_format.decimal == "." or self.table_format.matches(trimmed):  # 1.234 is not 1,234
                with suppress(pa.ArrowInvalid):
                    return parse_numbers(trimmed, self.table_format).to_numpy(zero_copy_only=False)
            unmatched = trimmed.filter(pc.invert(pc.match_substring_regex(trimmed, self.table_format.pattern)))
            self.formatted_example = (unmatched if len(unmatched) else trimmed)[0].as_py()
            # the plain numbers so far, if any, had neither an affix nor a thousands separator
            formats = list(candidate_formats(self.formatted_example))
            formats = [f for f in formats if f.affix == "{}" or not self.numeric_count]
            formats.sort(key=lambda f: f.decimal != self.table_format.decimal)
        formats = [f for f in formats if f.matches(trimmed)]
        if not formats:
            return None
        if self.numeric_count and formats[0].decimal != self.number_formats[0].decimal:
            self.decimals = None  # the decimals so far were counted after another mark
        self.number_formats = formats
        return parse_numbers(trimmed, formats[0]).to_numpy(zero_copy_only=False)

    def _add_numbers(self, values: Values) -> None:
        if not np.isfinite(values).all():
            raise self._error("holds an infinite number; write a finite one, or leave it empty")
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.decimals, self.step = fewest_decimals(values, self.decimals), coarsest_step(values, self.step)
        if self.decimals != 0:
            self.hashes = None  # not an id, and the hashes would take as much memory as the column

    def _narrow_dates(self, trimmed: pa.Array) -> None:
        if not self.date_formats:
            return
        texts = trimmed.to_pylist()
        self.date_formats = [date_format for date_format in self.date_formats if matches_format(texts[0], date_format)]
        for date_format in list(self.date_formats):
            dates = parse_dates(texts, date_format)
            if np.isnan(dates).any():
                self.date_formats.remove(date_format)
                self.date_mismatches[date_format] = texts[int(np.isnan(dates).argmax())]
            elif date_format == self.date_formats[0]:
                self._add_dates(texts, dates, date_format)

    def _add_dates(self, texts: list[str], dates: Values, date_format: str) -> None:
        if date_format.endswith("%z"):
            self.offsets |= {UTC_OFFSET.findall(text)[0] for text in texts}
            dates = parse_dates([UTC_OFFSET.sub("", text) for text in texts], date_format.removesuffix("%z"))
        self.step = coarsest_step(dates, self.step)
        self.bare |= {directives for directives, pattern in UNPADDED.items() if any(map(pattern.search, texts))}
        if "%f" in date_format:
            digits = {len(match[1]) for match in map(FRACTION.search, texts) if match}
            self.digits = digits.pop() if len(digits | {self.digits} - {None}) == 1 else 0

    def _error(self, message: str) -> UserError:
        return UserError(f"{self.location} {message}", code=1)

    # -- the result

    def column(self, override: KindOverride | None, notes: list[str]) -> Column:
        """The column, by the rules at the head of this module.

        Args:
            override: What the user declares it to be.
            notes: Messages to the user are appended here.

        Raises:
            UserError: The column cannot be modelled.
        """
        column = self._column(override, notes)
        if len(self.markers) > 1 and column.kind != "category":
            notes.append(f"{self.location}: missing cells are written in several ways, here all as {self.missing!r}")
        return column

    def _column(self, override: KindOverride | None, notes: list[str]) -> Column:
        present = self.rows - self.nulls - self.markers.total()
        if not present:
            return self._build("constant")
        if self.dtype and self.dtype.startswith(("timestamp", "date")):
            self._format_parquet_dates()
        if self.levels is not None and len(self.levels) == 1 and self.complete:
            return self._build("constant", value=next(iter(self.levels)))
        if override == "number":
            return self._numeric(present, notes, forced=True)
        pair = self._boolean_levels()
        if pair and (self.complete or not override):
            return self._build("boolean", levels=pair)
        if override == "category":
            return self._category()
        if self.date_format:
            return self._build("date", step=STEPS[self.step])
        if self.number_formats:
            return self._numeric(present, notes)
        return self._date(notes) if self.date_formats else self._text(present)

    def _build(self, kind: str, **fields: object) -> Column:
        fields = {"missing": self.missing, "dtype": self.dtype, "format": self.date_format, **fields}
        return Column(self.name, kind, **fields)  # type: ignore[arg-type]

    def _format_parquet_dates(self) -> None:
        """Choose the text format of Parquet dates, and turn the levels, seconds until now, into texts."""
        step = STEPS[self.step]
        self.date_format = "%Y-%m-%d" + ("" if step == STEPS[0] else " %H:%M:%S" if step >= 1 else " %H:%M:%S.%f")
        if self.levels:
            texts = format_dates(np.array(list(self.levels), np.float64), self.date_format)
            self.levels = Counter(dict(zip(texts, self.levels.values(), strict=True)))

    def _boolean_levels(self) -> list[str] | None:
        """The two levels of a boolean, false first; None if it is none."""
        if self.levels is None or len(self.levels) != 2:
            return None
        texts = {text.strip().lower(): text for text in self.levels}
        pair = next((pair for pair in BOOLEAN_PAIRS if set(pair) == set(texts)), None)
        return [texts[level] for level in pair] if pair else None

    def _category(self) -> Column:
        if self.levels is None:
            advice = f"too many for a category; leave the column out: --exclude {self.name!r}"
            raise self._error(f"holds more than {MAX_LEVELS:,} different texts: {advice}")
        counts = self._level_counts()
        levels = sorted(counts, key=lambda text: (-counts[text], text))
        return self._build("category", levels=levels, missing=self.missing_text)

    def _level_counts(self) -> Counter[str]:
        """Rows of each level of a category. Of several markers, only `missing_text` is missing: others are levels."""
        missing = None if self.dtype else self.missing_text
        return (self.levels or Counter()) + Counter({text: n for text, n in self.markers.items() if text != missing})

    def _numeric(self, present: int, notes: list[str], forced: bool = False) -> Column:
        if not self.number_formats or self.date_format:
            raise self._error(f"is not numeric ({self.non_number or self.date_format!r}), as --numeric declares")
        number_format, whole = self.number_formats[0], self.decimals == 0
        if whole and not forced:
            consecutive = self.low in (0, 1) and self.high - self.low == present - 1
            if self.unique and (consecutive or ID_NAME.search(self.name.strip())):
                return self._build("id", decimals=0, low=self.low, format=number_format.affix)
            if self.levels is not None and len(self.levels) <= min(MAX_INTEGER_LEVELS, present // 10):
                return self._category()
        fields: dict[str, Any] = {"decimals": self.decimals, "point": self.point}
        if self.decimals is not None:
            fields["digits"] = self.digits or None
        if number_format != self.table_format:
            value = parse_numbers(pa.array([self.formatted_example]), number_format)[0].as_py()
            notes.append(f"{self.location}: {self.formatted_example!r} is read as {format_number(value)}")
            fields |= number_format._asdict()
        return self._build("integer" if whole else "number", **fields)

    def _date(self, notes: list[str]) -> Column:
        date_format = self.date_formats[0]
        if any(other[:2] != date_format[:2] for other in self.date_formats):
            notes.append(f"{self.location}: day and month are ambiguous; read as {date_format}")
        if len(self.offsets) == 1:
            date_format = date_format.replace("%z", self.offsets.pop())
        elif self.offsets:  # they are written in UTC, where local days begin at any hour and minute
            notes.append(f"{self.location}: has several UTC offsets; new times are in UTC")
            self.step = max(self.step, MINUTE_STEP)
        bare = "".join(sorted(self.bare))
        return self._build("date", format=date_format, step=STEPS[self.step], digits=self.digits or None, bare=bare)

    def _text(self, present: int) -> Column:
        if self.levels is None or len(self.levels) > 2 * MAX_INTEGER_LEVELS:
            self._refuse_mixed(present)
        if self.unique and self.max_length <= MAX_ID_LENGTH and self.spaces < 2 * present:
            return self._build("id", format=self._id_format())
        counts = self._level_counts()
        if self.levels is not None and len(counts) <= counts.total() / 2:
            return self._category()
        count = f"more than {MAX_LEVELS:,}" if self.levels is None else f"{len(self.levels):,}"
        advice = "leave the column out (--exclude), or name it in --categorical if these are classes"
        raise self._error(f"holds {count} different texts in {present:,} cells, too many; {advice}")

    def _refuse_mixed(self, present: int) -> None:
        """Raise if nearly all texts are numbers or dates."""
        if self.non_number and self.numeric_count >= 0.9 * present:
            raise self._error(f"holds numbers, and also {self.non_number!r}; {CORRECT_CELL}")
        if self.number_like_count and self.numeric_count + self.number_like_count >= 0.9 * present:
            like = next((text for text in self.sample if re.match(NUMBER_LIKE, text)), self.sample[0])
            advice = "use one format, such as 1234.5 and 12:30, or name the column in --categorical or --exclude"
            raise self._error(f"holds numbers or times such as {like!r}, in several formats; {advice}")
        non_date = find_non_date(self.sample, self.date_mismatches)
        if non_date:
            raise self._error(f"holds dates, and also {non_date!r}; {CORRECT_CELL}")

    def _id_format(self) -> str:
        """A str.format of new ids like the present ones: "user_{:05d}" for user_00017."""
        parts = [re.fullmatch(r"(\D*)(\d+)", text) for text in self.sample]
        if not parts or not all(parts):
            return "{}"
        prefixes, widths = {m[1] for m in parts if m}, {len(m[2]) for m in parts if m}
        if len(prefixes) > 1:
            return "{}"
        prefix = prefixes.pop().replace("{", "{{").replace("}", "}}")
        return prefix + (f"{{:0{widths.pop()}d}}" if len(widths) == 1 else "{}")
