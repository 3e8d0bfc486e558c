"""How the columns of tables are distributed, as a picture: bars of levels, outlines of numbers, sets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .columns import Column, Values
from .late import Late

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont
else:
    ImageDraw, ImageFont = Late("PIL.ImageDraw"), Late("PIL.ImageFont")

WIDE, HIGH, GAP, LINE = 220, 120, 14, 14  # pixels of a panel, between panels, of a line of text
BINS = 30  # of numbers
SHOWN = 20  # levels of a category, the most frequent ones
COLOURS = ((150, 160, 175), (200, 80, 50))  # of the first set and the second


def shares(column: Column, values: Values) -> Values:
    """The share of cells in each bin or level (bins,), and of missing ones at the end where there are any."""
    known = values[~np.isnan(values)]
    if column.levels:
        count = np.bincount(np.rint(known).astype(np.int64), minlength=len(column.levels))[:SHOWN]
    else:
        low, high = column.low or 0.0, column.high or 0.0
        count, _ = np.histogram(known.clip(low, high), bins=BINS, range=(low, high if high > low else low + 1))
    absent = [len(values) - len(known)] if column.missing is not None else []
    return np.concatenate([count, absent]) / max(len(values), 1)


def histograms(columns: Sequence[Column], sets: Sequence[Values], across: int | None = None) -> Image.Image:
    """A panel for each column, with the bars of one set, or of two side by side.

    Args:
        columns: What the values are.
        sets: One or two arrays (N, D).
        across: Panels in a row; default makes the picture about square.
    """
    across = min(across or int(np.ceil(np.sqrt(len(columns) * 0.7))), len(columns))
    down = -(-len(columns) // across)
    picture = Image.new("RGB", (across * (WIDE + GAP) + GAP, down * (HIGH + LINE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(LINE - 2)
    for i, column in enumerate(columns):
        left, top = GAP + i % across * (WIDE + GAP), GAP + i // across * (HIGH + LINE + GAP)
        draw.text((left, top), column.name[:32], "black", font)
        _bars(draw, [shares(column, values[:, i]) for values in sets], left, top + LINE)
    return picture


def _bars(draw: ImageDraw.ImageDraw, sets: Sequence[Values], left: int, top: int) -> None:
    """Bars of one panel; the tallest of all fills it."""
    tallest = max(float(np.max(share)) for share in sets) or 1.0
    step = WIDE / len(sets[0])
    width = max(1.0, 0.86 * step / len(sets))
    for k, share in enumerate(sets):
        for i, part in enumerate(share):
            x, y = left + i * step + k * width, top + HIGH * (1 - float(part) / tallest)
            draw.rectangle((x, min(y, top + HIGH - 1), x + width - 1, top + HIGH), fill=COLOURS[k])
    draw.line((left, top + HIGH, left + WIDE, top + HIGH), fill="black")
