"""How numbers are spelt in texts: the decimal mark, marks between thousands, a currency or unit beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .late import Late

if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = Late("pyarrow")

pc: Any = Late("pyarrow.compute")  # a type checker sees none of its functions: they are made while it is imported

INTEGER = r"^-?(0|[1-9]\d*)$"
PADDED = r"^[+-]?0\d"
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
MARKS = ((".", ""), (".", ","), (",", ""), (",", "."), (".", "'"))  # of decimals, and between thousands
_BEFORE = r"(?:US\$|[$€£¥₹]|USD|EUR|GBP|CHF) ?"
_AFTER = r"\s?[^\s\d.,'+:/()-]\D{0,7}"  # any unit: that all cells have the same one is what makes it one
_BLANKS = " \u00a0\u202f"
_DIGITS = rf"(?:\d+(?:[.,]\d+)?|\d{{1,3}}(?:[.,'{_BLANKS}]\d{{3}})+(?:[.,]\d+)?)"
# a number in any of these spellings, or a time of the day: what has many of them is no list of names (RE2)
LIKE_NUMBER = rf"^[+-]?(?:{_BEFORE})?[+-]?{_DIGITS}\s?[%$€£¥₹]?$|^\d+:\d\d(?::\d\d(?:\.\d+)?)?$"


class Spelling(NamedTuple):
    """How the numbers of a column are spelt.

    Args:
        decimal: The decimal mark.
        thousands: What stands between groups of three digits; "" for nothing.
        affix: What stands around each number, as a str.format: "${}", "{} kg".
    """

    decimal: str = "."
    thousands: str = ""
    affix: str = "{}"

    @property
    def around(self) -> tuple[str, str]:
        """What stands before each number, and after it."""
        before, _, after = self.affix.format("\0").partition("\0")
        return before, after

    @property
    def pattern(self) -> str:
        """A regular expression of the numbers that are spelt in this way."""
        before, after = map(re.escape, self.around)
        decimal, thousands = re.escape(self.decimal), re.escape(self.thousands)
        whole = rf"(?:0|[1-9]\d{{0,2}}(?:{thousands}\d{{3}})*)" if thousands else r"\d+"
        return rf"^[+-]?{before}[+-]?(?:{whole}(?:{decimal}\d*)?|{decimal}\d+){after}$"

    def fits(self, texts: pa.Array) -> bool:
        """Whether all texts, without blanks around them, are spelt in this way."""
        return pc.all(pc.match_substring_regex(texts, self.pattern)).as_py()


PLAIN = Spelling()


def spellings(text: str) -> Iterator[Spelling]:
    """The ways in which a text, without blanks around it, is a number."""
    match = re.fullmatch(rf"[+-]?({_BEFORE})?[+-]?[\d.,']*\d({_AFTER})?", text)
    if match:
        before, after = ((part or "").replace("{", "{{").replace("}", "}}") for part in match.groups())
        found = (Spelling(*marks, f"{before}{{}}{after}") for marks in MARKS)
        yield from (spelling for spelling in found if re.match(spelling.pattern, text))


def numbers(cells: pa.Array, spelling: Spelling = PLAIN) -> pa.Array:
    """Texts as float64, also those that lack what stands around the others; missing stays missing.

    Raises:
        pyarrow.ArrowInvalid: One of them is not a number.
    """
    plain = cells
    for part in filter(None, spelling.around):
        plain = pc.replace_substring(plain, part.strip(), "", max_replacements=1)
    if spelling.thousands:
        plain = pc.replace_substring_regex(plain, re.escape(spelling.thousands) + r"(\d{3})", r"\1")
    if spelling.decimal != ".":
        plain = pc.replace_substring(plain, spelling.decimal, ".")
    return pc.cast(pc.utf8_trim_whitespace(plain), pa.float64())


def number_text(value: float, spelling: Spelling = PLAIN, point: bool = False, digits: int | None = None) -> str:
    """The shortest text that reads as this number.

    Args:
        value: The number.
        spelling: How it is spelt.
        point: Whether a whole number has a point, too.
        digits: How many digits follow the point; None for as many as it takes.
    """
    grouped = "," if spelling.thousands else ""
    if digits is not None:
        text = format(value, f"{grouped}.{digits}f")
    else:
        whole = value.is_integer() and abs(value) <= 2**53 and not point
        text = format(int(value) if whole else value, grouped)
    text = text.translate({ord(","): spelling.thousands, ord("."): spelling.decimal})
    size = text.removeprefix("-")
    return text.removesuffix(size) + spelling.affix.format(size)
