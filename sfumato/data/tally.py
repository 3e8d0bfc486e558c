"""What kind of column it is, found out from its cells.

The rules, in this order (`Tally.column`):

1. All cells missing, or one text and none missing: a constant.
2. Two texts that are a pair such as false/true, no/yes, 0/1 (in one spelling): a boolean.
3. Named by the user as a category, or as numbers: that.
4. All numbers: whole ones are an id if they differ in every row and are 1..n (or 0..n-1) in any order or bear a name
   such as id; a category if there are at most 10 of them, each in 10 rows on average; else integers. The others are
   numbers. Codes with leading zeros, and whole numbers over 2^53, are texts. So are numbers in other spellings, if all
   cells have the same one: with a percent sign, a currency or a unit, a decimal comma, or marks between thousands.
5. All dates, or times of the day, in one of the known formats: a date.
6. Texts without missing cells that differ in every row, at most 64 letters and not sentences: an id.
7. At most 10,000 texts, each in two rows on average: a category. Rare ones stay.
8. Anything else cannot be modelled, and is refused; and before 6 more than 20 texts, nearly all of them like numbers.

Cells that hold a word such as NA are missing, except in categories: there one way of writing it is (`missing_text`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .columns import MARKERS, Column, Values, blanks
from .dates import BARE, FORMATS, FRACTION, MINUTES, STEPS, ZONE, coarsest, date_texts, reads, seconds, stray
from .late import Late
from .spelling import INTEGER, LIKE_NUMBER, NUMBER, PADDED, Spelling, number_text, numbers, pc, spellings

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
else:
    pa, pd = Late("pyarrow"), Late("pandas")

MOST_LEVELS = 10_000
FEW_INTEGERS = 10  # so many whole numbers, each in so many rows on average, are taken for classes
MOST_DECIMALS = 9
LONGEST_ID = 64  # letters
PAIRS = (("false", "true"), ("no", "yes"), ("f", "t"), ("n", "y"), ("off", "on"), ("0", "1"), ("0.0", "1.0"))
ID_NAME = re.compile(
    r"(^|[^a-z])(id|no|nr|index|key|row|rowid|row_?num(ber)?|uuid|guid)$|^unnamed: 0$|^__index_level_\d+__$|^$",
    re.IGNORECASE,
)
Meant = Literal["category", "number"]  # what a user can say that a column is


class Tally:
    """Facts about one column, gathered piece by piece.

    Args:
        name: As in the header.
        where: The file, for what is said to the user.
        dtype: Arrow type in a Parquet source.
        decimal: The decimal mark of a text file.
    """

    def __init__(self, name: str, where: object, dtype: str | None = None, decimal: str = ".") -> None:
        self.name, self.place, self.dtype = name, f"{where}: column {name!r}", dtype
        self.rows, self.nulls, self.markers = 0, 0, Counter[str]()  # markers: texts that stand for a missing cell
        self.levels: Counter[str] | None = Counter()  # None: too many
        self.hashes: list[NDArray[np.uint64]] | None = []  # of the cells of one file; None: some are equal or missing
        self.plain = Spelling(decimal)
        self.spellings, self.spelt = [self.plain], ""  # those that all numbers may have, and the first of them
        self.point, self.decimals, self.low, self.high = True, 0, np.inf, -np.inf
        self.digits: int | None = None  # behind the point of each number: None before the first, 0 where they differ
        self.numeric, self.alike, self.odd = 0, 0, ""  # cells that are numbers, look like some; the first that does not
        self.formats, self.step = list(FORMATS), 0
        self.zones = set[str]()  # offsets of times
        self.bare = set[str]()  # of dates and times: those of `BARE` that have no leading zero
        self.undated = dict[str, str]()  # a text that is not in the format of the others
        self.layout: str | None = None  # of dates in Parquet
        self.longest, self.spaces, self.sample = 0, 0, list[str]()

    def add(self, cells: pa.Array) -> None:
        """Take the next cells (N,): texts, or float64."""
        blank = blanks(cells)
        here = cells.filter(pc.invert(blank))
        self.rows += len(cells)
        if len(here) < len(cells):
            marks = cells.filter(blank)
            marks = marks.slice(0, 0) if pa.types.is_floating(cells.type) else marks.drop_null()
            self.nulls += len(cells) - len(here) - len(marks)
            self.markers.update({item["values"]: item["counts"] for item in marks.value_counts().to_pylist()})
        if len(here):
            counted = here.value_counts()
            different, counts = counted.field("values"), counted.field("counts")
            self._count(different, counts, len(here) == len(different) == len(cells))
            self._kinds(different, counts)

    @property
    def whole(self) -> bool:
        """Whether no cell is missing."""
        return not self.nulls and not self.markers

    @property
    def missing(self) -> str | None:
        """The most frequent way in which a missing cell is written: "" for the nulls of Parquet."""
        return None if self.whole else "" if self.dtype else self._most(self.markers)

    @property
    def missing_text(self) -> str | None:
        """How a missing text is written: null in Parquet, in text files as an empty cell or, without these, a word."""
        if self.dtype:
            return "" if self.nulls else None
        markers = [text for text in self.markers if text.strip().lower() in MARKERS]
        return self._most([text for text in markers if not text.strip()] or markers)

    def _most(self, markers: Iterable[str]) -> str | None:
        return min(markers, key=lambda text: (-self.markers[text], text), default=None)

    @property
    def unique(self) -> bool:
        """Whether the cells of each file differ, and none is missing."""
        return self.hashes is not None and self.whole

    def _count(self, different: pa.Array, counts: pa.Array, unique: bool) -> None:
        if unique and self.hashes is not None:
            self.hashes.append(pd.util.hash_array(different.to_numpy(zero_copy_only=False)))  # type: ignore[operator]
        else:
            self.hashes = None
        if self.levels is None or len(different) > MOST_LEVELS:
            self.levels = None
            return
        found = different.to_pylist()
        words = [v if isinstance(v, str) else number_text(v) for v in found]
        self.levels.update(dict(zip(words, counts.to_pylist(), strict=True)))
        self.levels = self.levels if len(self.levels) <= MOST_LEVELS else None

    def end_file(self) -> None:
        """No more cells of this file: do its cells all differ?"""
        if self.hashes:
            seen = np.concatenate(self.hashes)
            self.hashes = [] if len(np.unique(seen)) == len(seen) else None

    def _kinds(self, different: pa.Array, counts: pa.Array) -> None:
        """Narrow down what these texts or numbers can be."""
        if pa.types.is_floating(different.type):
            self.point = self.dtype is not None and not self.dtype.startswith(("int", "uint"))
            self._take_numbers(different.to_numpy(zero_copy_only=False))
            return
        trimmed = pc.utf8_trim_whitespace(different)
        if self._numbers(trimmed):
            self.formats.clear()
            self.numeric += pc.sum(counts).as_py()
            return
        numeric, alike = (
            pc.match_substring_regex(trimmed, pattern)
            for pattern in (NUMBER.replace(r"\.", re.escape(self.plain.decimal)), LIKE_NUMBER)
        )
        self.numeric += pc.sum(pc.if_else(numeric, counts, 0)).as_py()
        self.alike += pc.sum(pc.if_else(pc.and_not(alike, numeric), counts, 0)).as_py()
        if self.spellings:
            self.spellings = []
            self.odd = next(iter(trimmed.filter(pc.invert(numeric)).to_pylist()), "")
        self._dates(trimmed)
        self.sample = self.sample or trimmed[:1000].to_pylist()
        self.longest = max(self.longest, pc.max(pc.utf8_length(different)).as_py())
        self.spaces += pc.sum(pc.count_substring(trimmed, " ")).as_py()

    def _numbers(self, trimmed: pa.Array) -> bool:
        """Whether all are numbers, in one spelling; then their grid and range are noted."""
        if not self.spellings or pc.any(pc.match_substring_regex(trimmed, PADDED)).as_py():
            return False
        values = self._values(trimmed)
        if values is None:
            return False
        if np.abs(values).max() > 2**53 and pc.all(pc.match_substring_regex(trimmed, INTEGER)).as_py():
            return False
        mark = re.escape(self.spellings[0].decimal)
        self.point = self.point and pc.all(pc.match_substring_regex(trimmed, rf"{mark}|\d[eE]")).as_py()
        after = re.search(rf"{mark}(\d+)\D*$", trimmed[0].as_py())
        digits = len(after[1]) if after else 0
        same = digits and pc.all(pc.match_substring_regex(trimmed, rf"{mark}\d{{{digits}}}\D*$")).as_py()
        self.digits = digits if same and self.digits in (None, digits) else 0
        self._take_numbers(values)
        return True

    def _values(self, trimmed: pa.Array) -> Values | None:
        """The texts as numbers, in a spelling that all until now have; None if there is none."""
        found = self.spellings
        if found == [self.plain]:
            if self.plain.decimal == "." or self.plain.fits(trimmed):  # 1.234 is no 1,234
                with suppress(pa.ArrowInvalid):
                    return numbers(trimmed, self.plain).to_numpy(zero_copy_only=False)
            other = trimmed.filter(pc.invert(pc.match_substring_regex(trimmed, self.plain.pattern)))
            self.spelt = (other if len(other) else trimmed)[0].as_py()
            # cells that were plain numbers until now had nothing around them, and had no marks between thousands
            found = [spelling for spelling in spellings(self.spelt) if spelling.affix == "{}" or not self.numeric]
            found.sort(key=lambda spelling: spelling.decimal != self.plain.decimal)
        found = [spelling for spelling in found if spelling.fits(trimmed)]
        if not found:
            return None
        if self.numeric and found[0].decimal != self.spellings[0].decimal:
            self.decimals = None  # those until now were counted by another mark
        self.spellings = found
        return numbers(trimmed, found[0]).to_numpy(zero_copy_only=False)

    def _take_numbers(self, values: Values) -> None:
        if not np.isfinite(values).all():
            raise UserError(f"{self.place} holds an infinite number; write a number there, or leave it empty", code=1)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.decimals, self.step = _decimals(values, self.decimals), coarsest(values, self.step)
        if self.decimals != 0:
            self.hashes = None  # no name of a row, and they would take as much memory as the column

    def _dates(self, trimmed: pa.Array) -> None:
        if not self.formats:
            return
        found = trimmed.to_pylist()
        self.formats = [layout for layout in self.formats if reads(found[0], layout)]
        for layout in list(self.formats):
            stamps = seconds(found, layout)
            if np.isnan(stamps).any():
                self.formats.remove(layout)
                self.undated[layout] = found[int(np.isnan(stamps).argmax())]
            elif layout == self.formats[0]:
                if layout.endswith("%z"):
                    self.zones |= {ZONE.findall(text)[0] for text in found}
                    stamps = seconds([ZONE.sub("", text) for text in found], layout.removesuffix("%z"))
                self.step = coarsest(stamps, self.step)
                self.bare |= {which for which, pattern in BARE.items() if any(map(pattern.search, found))}
                if "%f" in layout:
                    digits = {len(match[1]) for match in map(FRACTION.search, found) if match}
                    self.digits = digits.pop() if len(digits | {self.digits} - {None}) == 1 else 0

    # -- what it is

    def column(self, meant: Meant | None, notes: list[str]) -> Column:
        """The column, by the rules at the head of this module.

        Args:
            meant: What the user says that it is.
            notes: Where to put what the user should know.

        Raises:
            UserError: The column cannot be modelled.
        """
        column = self._column(meant, notes)
        if len(self.markers) > 1 and column.kind != "category":
            notes.append(f"{self.place}: missing cells are written in several ways, here all as {self.missing!r}")
        return column

    def _column(self, meant: Meant | None, notes: list[str]) -> Column:
        present = self.rows - self.nulls - self.markers.total()
        if not present:
            return self._make("constant")
        if self.dtype and self.dtype.startswith(("timestamp", "date")):
            self._as_dates()
        if self.levels is not None and len(self.levels) == 1 and self.whole:
            return self._make("constant", value=next(iter(self.levels)))
        if meant == "number":
            return self._numeric(present, notes, meant=True)
        pair = self._pair()
        if pair and (self.whole or not meant):
            return self._make("boolean", levels=pair)
        if meant == "category":
            return self._category()
        if self.layout:
            return self._make("date", step=STEPS[self.step])
        if self.spellings:
            return self._numeric(present, notes)
        return self._date(notes) if self.formats else self._text(present)

    def _make(self, kind: str, **facts: object) -> Column:
        facts = {"missing": self.missing, "dtype": self.dtype, "format": self.layout, **facts}
        return Column(self.name, kind, **facts)  # type: ignore[arg-type]

    def _as_dates(self) -> None:
        """Settle how the dates of Parquet, seconds until now, are written as texts; the levels are texts."""
        step = STEPS[self.step]
        self.layout = "%Y-%m-%d" + ("" if step == STEPS[0] else " %H:%M:%S" if step >= 1 else " %H:%M:%S.%f")
        if self.levels:
            spelt = date_texts(np.array(list(self.levels), np.float64), self.layout)
            self.levels = Counter(dict(zip(spelt, self.levels.values(), strict=True)))

    def _pair(self) -> list[str] | None:
        """The two levels of a boolean, false first."""
        if self.levels is None or len(self.levels) != 2:
            return None
        spelt = {text.strip().lower(): text for text in self.levels}
        pair = next((pair for pair in PAIRS if set(pair) == set(spelt)), None)
        return [spelt[word] for word in pair] if pair else None

    def _category(self) -> Column:
        if self.levels is None:
            advice = f"too many for a category; leave the column out: --exclude {self.name!r}"
            raise UserError(f"{self.place} holds more than {MOST_LEVELS:,} different texts: {advice}", code=1)
        counts = self._texts()
        levels = sorted(counts, key=lambda text: (-counts[text], text))
        return self._make("category", levels=levels, missing=self.missing_text)

    def _texts(self) -> Counter[str]:
        """The levels of a category. A second way of writing "missing" is one: it may well mean something else."""
        gone = None if self.dtype else self.missing_text
        return (self.levels or Counter()) + Counter({text: n for text, n in self.markers.items() if text != gone})

    def _numeric(self, present: int, notes: list[str], meant: bool = False) -> Column:
        if not self.spellings or self.layout:
            raise UserError(f"{self.place} is no column of numbers ({self.odd or self.layout!r}), as --numeric says", 1)
        spelling, whole = self.spellings[0], self.decimals == 0
        if whole and not meant:
            runs = self.low in (0, 1) and self.high - self.low == present - 1
            if self.unique and (runs or ID_NAME.search(self.name.strip())):
                return self._make("id", decimals=0, low=self.low, format=spelling.affix)
            if self.levels is not None and len(self.levels) <= min(FEW_INTEGERS, present // 10):
                return self._category()
        facts: dict[str, Any] = {"decimals": self.decimals, "point": self.point}
        if self.decimals is not None:
            facts["digits"] = self.digits or None
        if spelling != self.plain:
            value = numbers(pa.array([self.spelt]), spelling)[0].as_py()
            notes.append(f"{self.place}: {self.spelt!r} is read as {number_text(value)}")
            facts |= spelling._asdict()
        return self._make("integer" if whole else "number", **facts)

    def _date(self, notes: list[str]) -> Column:
        layout = self.formats[0]
        if any(other[:2] != layout[:2] for other in self.formats):
            notes.append(f"{self.place}: day and month cannot be told apart; read as {layout}")
        if len(self.zones) == 1:
            layout = layout.replace("%z", self.zones.pop())
        elif self.zones:  # they are written in UTC, where local days begin at any hour and minute
            notes.append(f"{self.place}: has times of several offsets; new ones are in UTC")
            self.step = max(self.step, MINUTES)
        return self._make(
            "date", format=layout, step=STEPS[self.step], digits=self.digits or None, bare="".join(sorted(self.bare))
        )

    def _text(self, present: int) -> Column:
        many = self.levels is None or len(self.levels) > 2 * FEW_INTEGERS
        if many and self.odd and self.numeric >= 0.9 * present:
            advice = "correct that cell, leave it empty, or name the column in --categorical or --exclude"
            raise UserError(f"{self.place} holds numbers, and also {self.odd!r}; {advice}", code=1)
        if many and self.alike and self.numeric + self.alike >= 0.9 * present:
            like = next((text for text in self.sample if re.match(LIKE_NUMBER, text)), self.sample[0])
            advice = "write all in one way, such as 1234.5 and 12:30, or name the column in --categorical or --exclude"
            raise UserError(
                f"{self.place} holds numbers or times such as {like!r}, in several spellings; {advice}", code=1
            )
        undated = stray(self.sample, self.undated) if many else None
        if undated:
            advice = "correct that cell, leave it empty, or name the column in --categorical or --exclude"
            raise UserError(f"{self.place} holds dates, and also {undated!r}; {advice}", code=1)
        if self.unique and self.longest <= LONGEST_ID and self.spaces < 2 * present:
            return self._make("id", format=self._pattern())
        texts = self._texts()
        if self.levels is not None and len(texts) <= texts.total() / 2:
            return self._category()
        count = f"more than {MOST_LEVELS:,}" if self.levels is None else f"{len(self.levels):,}"
        advice = "leave the column out (--exclude), or name it in --categorical if these are classes"
        raise UserError(f"{self.place} holds {count} different texts in {present:,} cells, too many; {advice}", code=1)

    def _pattern(self) -> str:
        """A str.format for new ids that look like these: "user_{:05d}" for user_00017."""
        parts = [re.fullmatch(r"(\D*)(\d+)", text) for text in self.sample]
        if not parts or not all(parts):
            return "{}"
        heads, widths = {m[1] for m in parts if m}, {len(m[2]) for m in parts if m}
        if len(heads) > 1:
            return "{}"
        head = heads.pop().replace("{", "{{").replace("}", "}}")
        return head + (f"{{:0{widths.pop()}d}}" if len(widths) == 1 else "{}")


def _decimals(values: Values, least: int | None) -> int | None:
    """The fewest decimals, `least` or more, that write all values exactly; None if nine do not."""
    for decimals in range(least if least is not None else MOST_DECIMALS + 1, MOST_DECIMALS + 1):
        # both operations round correctly, so a number that was read from so many decimals comes back bit for bit
        if (np.abs(values) * 10.0**decimals < 2**53).all() and (
            np.rint(values * 10.0**decimals) / 10.0**decimals == values
        ).all():
            return decimals
    return None
