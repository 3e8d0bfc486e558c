"""Histograms of the columns of one or two tables, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sfumato.lazy import LazyModule
from sfumato.modalities.table.columns import Column, Values

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont
else:
    ImageDraw, ImageFont = LazyModule("PIL.ImageDraw"), LazyModule("PIL.ImageFont")

PANEL_WIDTH, PANEL_HEIGHT = 220, 120  # pixels
PANEL_GAP, TEXT_HEIGHT = 14, 14  # pixels between panels, and of a line of text
HISTOGRAM_BINS = 30  # of a number
SHOWN_LEVELS = 20  # most frequent levels of a category that are shown
COLOURS = ((150, 160, 175), (200, 80, 50))  # RGB of the first table and the second


def frequencies(column: Column, values: Values) -> Values:
    """Relative frequency of each bin or level (bins,); missing cells come last, if the column can have any."""
    present = values[~np.isnan(values)]
    if column.levels:
        count = np.bincount(np.rint(present).astype(np.int64), minlength=len(column.levels))[:SHOWN_LEVELS]
    else:
        low, high = column.low or 0.0, column.high or 0.0
        limits = (low, high if high > low else low + 1)
        count, _ = np.histogram(present.clip(low, high), bins=HISTOGRAM_BINS, range=limits)
    missing = [len(values) - len(present)] if column.missing is not None else []
    return np.concatenate([count, missing]) / max(len(values), 1)


def histograms(columns: Sequence[Column], tables: Sequence[Values], across: int | None = None) -> Image.Image:
    """A histogram of each column, of one table or of two side by side.

    Args:
        columns: The D columns.
        tables: Values (N, D) of one or two tables.
        across: Panels in a row; the default makes the picture roughly square.
    """
    across = min(across or int(np.ceil(np.sqrt(len(columns) * 0.7))), len(columns))
    down = -(-len(columns) // across)
    step_x, step_y = PANEL_WIDTH + PANEL_GAP, PANEL_HEIGHT + TEXT_HEIGHT + PANEL_GAP
    picture = Image.new("RGB", (across * step_x + PANEL_GAP, down * step_y + PANEL_GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_HEIGHT - 2)
    for i, column in enumerate(columns):
        left, top = PANEL_GAP + i % across * step_x, PANEL_GAP + i // across * step_y
        draw.text((left, top), column.name[:32], "black", font)
        _bars(draw, [frequencies(column, values[:, i]) for values in tables], left, top + TEXT_HEIGHT)
    return picture


def _bars(draw: ImageDraw.ImageDraw, histograms: Sequence[Values], left: int, top: int) -> None:
    """The bars of one panel; the tallest of all fills its height."""
    tallest = max(float(np.max(heights)) for heights in histograms) or 1.0
    step = PANEL_WIDTH / len(histograms[0])
    width = max(1.0, 0.86 * step / len(histograms))
    for k, heights in enumerate(histograms):
        for i, height in enumerate(heights):
            x, y = left + i * step + k * width, top + PANEL_HEIGHT * (1 - float(height) / tallest)
            draw.rectangle((x, min(y, top + PANEL_HEIGHT - 1), x + width - 1, top + PANEL_HEIGHT), fill=COLOURS[k])
    draw.line((left, top + PANEL_HEIGHT, left + PANEL_WIDTH, top + PANEL_HEIGHT), fill="black")
