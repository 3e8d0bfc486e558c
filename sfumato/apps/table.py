"""Results as lines a person reads: `name value`, and numbers beside their floors."""

from collections.abc import Iterator, Mapping
from typing import Any

FLOOR = "_floor"  # ends the name of what real data score, beside that of the number itself


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of plain entries, then a table of those that have a floor (the same number of real held-out data)."""
    flat = {key: value for key, value in _flatten(result) if value is not None}
    measured = [key for key in flat if key + FLOOR in flat]
    plain = {key: value for key, value in flat.items() if key.removesuffix(FLOOR) not in measured}
    width = max((len(key) for key in flat), default=0)
    lines = [f"{key:<{width}}  {_plain(value)}" for key, value in plain.items()]
    rows = [(key, _plain(flat[key]), _plain(flat[key + FLOOR])) for key in measured]
    cells = [("", "value", "floor"), *rows] if rows else []
    return lines + [f"{name:<{width}}  {value:>10}  {floor:>10}" for name, value, floor in cells]


def _flatten(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        said = {key: _plain(part) for key, part in value.items() if part is not None and part is not False}
        return "  ".join(f"{key} {text}" for key, text in said.items() if text)
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return "".join(f"\n  {part}" for part in parts) if any(" " in part for part in parts) else ", ".join(parts)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
