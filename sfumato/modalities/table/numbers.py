"""Numbers in text cells: the decimal mark, the thousands separator, a currency or unit; parsed and written again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.lazy import LazyModule

if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = LazyModule("pyarrow")

pc: Any = LazyModule("pyarrow.compute")  # its functions are created at import, so a type checker sees none

INTEGER = r"^-?(0|[1-9]\d*)$"
ZERO_PADDED = r"^[+-]?0\d"
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
MARKS = ((".", ""), (".", ","), (",", ""), (",", "."), (".", "'"))  # pairs (decimal mark, thousands separator)
MAX_DECIMALS = 9  # of a number that is not continuous
_PREFIX = r"(?:US\$|[$€£¥₹]|USD|EUR|GBP|CHF) ?"
_SUFFIX = r"\s?[^\s\d.,'+:/()-]\D{0,7}"  # any text is a unit, provided that all cells have the same one
_SPACES = " \u00a0\u202f"
_DIGITS = rf"(?:\d+(?:[.,]\d+)?|\d{{1,3}}(?:[.,'{_SPACES}]\d{{3}})+(?:[.,]\d+)?)"
# a number in any of these formats, or a time of day: a column with many of them is not an id column (RE2 syntax)
NUMBER_LIKE = rf"^[+-]?(?:{_PREFIX})?[+-]?{_DIGITS}\s?[%$€£¥₹]?$|^\d+:\d\d(?::\d\d(?:\.\d+)?)?$"


class NumberFormat(NamedTuple):
    """How a column writes its numbers.

    Args:
        decimal: Decimal mark.
        thousands: Thousands separator; "" for none.
        affix: Text around each number, as a str.format: "${}", "{} kg".
    """

    decimal: str = "."
    thousands: str = ""
    affix: str = "{}"

    @property
    def affixes(self) -> tuple[str, str]:
        """The text before and after each number."""
        before, _, after = self.affix.format("\0").partition("\0")
        return before, after

    @property
    def pattern(self) -> str:
        """Regular expression of the numbers in this format."""
        before, after = map(re.escape, self.affixes)
        decimal, thousands = re.escape(self.decimal), re.escape(self.thousands)
        whole = rf"(?:0|[1-9]\d{{0,2}}(?:{thousands}\d{{3}})*)" if thousands else r"\d+"
        return rf"^[+-]?{before}[+-]?(?:{whole}(?:{decimal}\d*)?|{decimal}\d+){after}$"

    def matches(self, texts: pa.Array) -> bool:
        """Whether all texts (stripped) are numbers in this format."""
        return pc.all(pc.match_substring_regex(texts, self.pattern)).as_py()


PLAIN_FORMAT = NumberFormat()


def candidate_formats(text: str) -> Iterator[NumberFormat]:
    """The formats under which a stripped text is a number."""
    match = re.fullmatch(rf"[+-]?({_PREFIX})?[+-]?[\d.,']*\d({_SUFFIX})?", text)
    if match:
        before, after = ((part or "").replace("{", "{{").replace("}", "}}") for part in match.groups())
        formats = (NumberFormat(*marks, f"{before}{{}}{after}") for marks in MARKS)
        yield from (number_format for number_format in formats if re.match(number_format.pattern, text))


def parse_numbers(cells: pa.Array, number_format: NumberFormat = PLAIN_FORMAT) -> pa.Array:
    """Texts as float64; affixes are optional, missing cells stay missing.

    Raises:
        pyarrow.ArrowInvalid: A text is not a number.
    """
    bare = cells
    for affix in filter(None, number_format.affixes):
        bare = pc.replace_substring(bare, affix.strip(), "", max_replacements=1)
    if number_format.thousands:
        bare = pc.replace_substring_regex(bare, re.escape(number_format.thousands) + r"(\d{3})", r"\1")
    if number_format.decimal != ".":
        bare = pc.replace_substring(bare, number_format.decimal, ".")
    return pc.cast(pc.utf8_trim_whitespace(bare), pa.float64())


def format_number(
    value: float, number_format: NumberFormat = PLAIN_FORMAT, point: bool = False, digits: int | None = None
) -> str:
    """The shortest text that is read back as this number.

    Args:
        value: The number.
        number_format: How to write it.
        point: Write integers with a decimal mark, too ("3.0").
        digits: Number of decimals; None for as many as needed.
    """
    grouped = "," if number_format.thousands else ""
    if digits is not None:
        text = format(value, f"{grouped}.{digits}f")
    else:
        whole = value.is_integer() and abs(value) <= 2**53 and not point
        text = format(int(value) if whole else value, grouped)
    text = text.translate({ord(","): number_format.thousands, ord("."): number_format.decimal})
    magnitude = text.removeprefix("-")
    return text.removesuffix(magnitude) + number_format.affix.format(magnitude)


def fewest_decimals(values: NDArray[np.float64], minimum: int | None) -> int | None:
    """The fewest decimals, at least `minimum`, that represent all values exactly; None if nine do not."""
    for decimals in range(minimum if minimum is not None else MAX_DECIMALS + 1, MAX_DECIMALS + 1):
        # both operations round correctly, so a number read from that many decimals comes back bit for bit
        if (np.abs(values) * 10.0**decimals < 2**53).all() and (
            np.rint(values * 10.0**decimals) / 10.0**decimals == values
        ).all():
            return decimals
    return None
