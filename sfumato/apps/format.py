"""Results as lines of text: `name value`, and a table of metrics with their floors."""

from collections.abc import Iterator, Mapping
from typing import Any

FLOOR_SUFFIX = "_floor"  # ends the name of a metric's floor


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of plain entries, then a table of metrics that have a floor (the score of real held-out data)."""
    flat = {key: value for key, value in _flatten(result) if value is not None}
    metrics = [key for key in flat if key + FLOOR_SUFFIX in flat]
    plain = {key: value for key, value in flat.items() if key.removesuffix(FLOOR_SUFFIX) not in metrics}
    width = max((len(key) for key in flat), default=0)
    lines = [f"{key:<{width}}  {_text(value)}" for key, value in plain.items()]
    rows = [(key, _text(flat[key]), _text(flat[key + FLOOR_SUFFIX])) for key in metrics]
    table = [("", "value", "floor"), *rows] if rows else []
    return lines + [f"{name:<{width}}  {value:>10}  {floor:>10}" for name, value, floor in table]


def _flatten(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of nested mappings, under names such as `codec.psnr`."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    """A value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        texts = {key: _text(part) for key, part in value.items() if part is not None and part is not False}
        return "  ".join(f"{key} {text}" for key, text in texts.items() if text)
    if isinstance(value, list | tuple):
        parts = [_text(part) for part in value]
        return "".join(f"\n  {part}" for part in parts) if any(" " in part for part in parts) else ", ".join(parts)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
