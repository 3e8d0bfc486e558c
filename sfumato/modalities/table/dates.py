"""Dates and times in texts: formats, UTC offsets, leading zeros; parsed to seconds since 1970 and written again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sfumato.lazy import LazyModule

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = LazyModule("pandas")

Timestamps = NDArray[np.float64]  # seconds since 1970

UTC_OFFSET = re.compile(r"(Z|[+-]\d\d(?::?\d\d)?)$")  # at the end of a time, or of a format whose times share it
STEPS = (86400.0, 3600.0, 60.0, 1.0, 1e-3, 1e-6)  # seconds, coarsest first
MINUTE_STEP = 2  # index of a minute in STEPS
NON_DATE_SAMPLE = 200  # texts of a column that are searched for one that is not a date
UNPADDED = {  # strptime directives, and the pattern of a text that writes them without a leading zero
    "dm": re.compile(r"^\d[/.\- ]|[/.-]\d[/.-]|[/-]\d(?: |$|T)| \d,"),
    "HI": re.compile(r"(?:^|[ T])\d:"),
}
FRACTION = re.compile(r":\d\d\.(\d+)")  # decimals of a second
_TIMES = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
DATE_FORMATS = (
    *(f"%Y-%m-%d{t}{zone}" for t in _TIMES for zone in ("", " UTC")),
    *(f"%Y-%m-%dT%H:%M{t}{zone}" for zone in ("", "Z", "%z") for t in ("", ":%S", ":%S.%f")),
    "%Y-%m-%d %H:%M:%S%z",
    "%Y-%m-%d %H:%M:%S.%f%z",
    *(f"{day}{t}" for day in ("%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y") for t in _TIMES),
    *(t.strip() for t in _TIMES[1:]),
    *("%Y-%m", "%d-%b-%Y", "%d %b %Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%y"),
)


def _normalise(text: str) -> str:
    """A time as strptime accepts it: at most six decimals of a second, an offset with minutes."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    return text + ":00" if re.search(r"(^|:\d\d|\.\d+)[+-]\d\d$", text) else text


def parse_dates(texts: Sequence[str], date_format: str) -> Timestamps:
    """Seconds since 1970 of dates in a strptime format; NaN where a text does not match it.

    If the format ends in a fixed offset such as +02:00, the result is local time at that offset, whatever the offset
    of a text.
    """
    shared = UTC_OFFSET.search(date_format)
    if shared and shared[0] != "Z":
        offset = datetime.strptime(_normalise(shared[0]), "%z").utcoffset() or timedelta()
        return parse_dates(texts, UTC_OFFSET.sub("%z", date_format)) + offset.total_seconds()
    dates = pd.to_datetime(
        pd.Series(texts, dtype=object).str.strip(), format=date_format, errors="coerce", utc="%z" in date_format
    )
    # in microseconds: nanoseconds end in the year 2262, and 9999-12-31 often stands for "no end"
    since = dates.dt.tz_localize(None).dt.as_unit("us") - pd.Timestamp(0).as_unit("us")
    return (since / pd.Timedelta(seconds=1)).to_numpy(np.float64)


def to_datetimes(values: Timestamps) -> pd.Series:
    """Seconds since 1970, none missing, as pandas datetimes in microseconds."""
    return pd.Series(np.rint(values * 1e6).astype(np.int64).view("datetime64[us]"))


def format_dates(values: Timestamps, date_format: str, digits: int | None = None, bare: str = "") -> list[str]:
    """Seconds since 1970, none missing, as texts in a strptime format; `digits` and `bare` as in `Column`."""
    date_format = date_format.replace("%z", "+00:00")
    if bare:
        date_format = re.sub(f"(%[{bare}])", r"~\1", date_format)  # "~" occurs in no format
    written = to_datetimes(values).dt.strftime(date_format).tolist()
    if digits:
        written = [re.sub(r"(?<=\.)\d{6}", lambda six: f"{six[0]:0<{digits}}"[:digits], text) for text in written]
    return [re.sub("~0?", "", text) for text in written] if bare else written


def coarsest_step(values: Timestamps, first: int) -> int:
    """Index of the coarsest of `STEPS`, from `first` on, that divides all times (in seconds)."""
    for index in range(first, len(STEPS) - 1):
        multiples = values / STEPS[index]
        if (np.abs(multiples - np.rint(multiples)) * STEPS[index] < 1e-7).all():
            return index
    return len(STEPS) - 1


def matches_format(text: str, date_format: str) -> bool:
    """Whether a text is a date in this strptime format."""
    try:
        datetime.strptime(_normalise(text), date_format)
    except ValueError:
        return False
    return True


def find_non_date(texts: Sequence[str], mismatches: Mapping[str, str]) -> str | None:
    """The text that is not a date in a column of which at least nine in ten are; None if there is no such text.

    Args:
        texts: The first texts of a column.
        mismatches: For some formats, a later text that does not match.
    """
    sample = texts[:NON_DATE_SAMPLE]
    for date_format in DATE_FORMATS:
        rejected = [text for text in sample if not matches_format(text, date_format)]
        if len(rejected) <= 0.1 * len(sample):
            return rejected[0] if rejected else mismatches.get(date_format)
    return None
