"""How dates and times are spelt: their formats, offsets and leading zeros; seconds since 1970 and texts again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .late import Late

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Late("pandas")

Values = NDArray[np.float64]

ZONE = re.compile(r"(Z|[+-]\d\d(?::?\d\d)?)$")  # at the end of a time, or of the format of times that share it
STEPS = (86400.0, 3600.0, 60.0, 1.0, 1e-3, 1e-6)
MINUTES = 2  # their place in it
LOOKED_AT = 200  # texts that may be dates but for some
BARE = {  # directives of strptime, and where a text shows that they have no leading zero
    "dm": re.compile(r"^\d[/.\- ]|[/.-]\d[/.-]|[/-]\d(?: |$|T)| \d,"),
    "HI": re.compile(r"(?:^|[ T])\d:"),
}
FRACTION = re.compile(r":\d\d\.(\d+)")  # of a second
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
FORMATS = (
    *(f"%Y-%m-%d{t}{zone}" for t in _CLOCKS for zone in ("", " UTC")),
    *(f"%Y-%m-%dT%H:%M{t}{zone}" for zone in ("", "Z", "%z") for t in ("", ":%S", ":%S.%f")),
    "%Y-%m-%d %H:%M:%S%z",
    "%Y-%m-%d %H:%M:%S.%f%z",
    *(f"{day}{t}" for day in ("%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y") for t in _CLOCKS),
    *(t.strip() for t in _CLOCKS[1:]),
    *("%Y-%m", "%d-%b-%Y", "%d %b %Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%y"),
)


def strict(text: str) -> str:
    """A time as strptime takes it: six digits of a second at most, and an offset with its minutes."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    return text + ":00" if re.search(r"(^|:\d\d|\.\d+)[+-]\d\d$", text) else text


def seconds(texts: Sequence[str], layout: str) -> Values:
    """Seconds since 1970 of dates in one strptime format; NaN where a text is not such a date.

    Where the format ends in an offset such as +02:00, they are of local time there, whatever offset a text has.
    """
    shared = ZONE.search(layout)
    if shared and shared[0] != "Z":
        ahead = datetime.strptime(strict(shared[0]), "%z").utcoffset() or timedelta()
        return seconds(texts, ZONE.sub("%z", layout)) + ahead.total_seconds()
    found = pd.to_datetime(
        pd.Series(texts, dtype=object).str.strip(), format=layout, errors="coerce", utc="%z" in layout
    )
    # in microseconds: nanoseconds end in the year 2262, and 9999-12-31 often stands for "no end"
    since = found.dt.tz_localize(None).dt.as_unit("us") - pd.Timestamp(0).as_unit("us")
    return (since / pd.Timedelta(seconds=1)).to_numpy(np.float64)


def stamps(values: Values) -> pd.Series:
    """Seconds since 1970, none missing, as pandas' own times, in microseconds."""
    return pd.Series(np.rint(values * 1e6).astype(np.int64).view("datetime64[us]"))


def date_texts(values: Values, layout: str, digits: int | None = None, bare: str = "") -> list[str]:
    """Seconds since 1970, none missing, as texts in one strptime format; `digits` and `bare` as in `Column`."""
    layout = layout.replace("%z", "+00:00")
    if bare:
        layout = re.sub(f"(%[{bare}])", r"~\1", layout)  # no format has that sign
    written = stamps(values).dt.strftime(layout).tolist()
    if digits:
        written = [re.sub(r"(?<=\.)\d{6}", lambda six: f"{six[0]:0<{digits}}"[:digits], text) for text in written]
    return [re.sub("~0?", "", text) for text in written] if bare else written


def coarsest(values: Values, least: int) -> int:
    """Index of the largest step, from `least` on, that divides all times (in seconds)."""
    for index in range(least, len(STEPS) - 1):
        parts = values / STEPS[index]
        if (np.abs(parts - np.rint(parts)) * STEPS[index] < 1e-7).all():
            return index
    return len(STEPS) - 1


def reads(text: str, layout: str) -> bool:
    """Whether a text is a date in one strptime format."""
    try:
        datetime.strptime(strict(text), layout)
    except ValueError:
        return False
    return True


def stray(texts: Sequence[str], others: Mapping[str, str]) -> str | None:
    """Of texts nearly all of which are dates in one format, one that is none; None where they are no dates.

    Args:
        texts: Those of a column, or its first ones.
        others: For some formats a later text that is not in it.
    """
    some = texts[:LOOKED_AT]
    for layout in FORMATS:
        strange = [text for text in some if not reads(text, layout)]
        if len(strange) <= 0.1 * len(some):
            return strange[0] if strange else others.get(layout)
    return None
