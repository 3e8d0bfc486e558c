"""Results as lines a person reads: `name value`, and numbers beside their floors."""

from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = ("value", "floor")


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of plain entries, then a table of the measured ones (those that are `{"value": ..., "floor": ...}`)."""
    plain = dict(_flatten({key: value for key, value in result.items() if not _measured(value)}))
    width = max((len(key) for key in plain), default=0)
    lines = [f"{key:<{width}}  {_plain(value)}" for key, value in plain.items() if value is not None]
    return lines + metric_lines({key: value for key, value in _entries(result) if _measured(value)})


def metric_lines(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table: each metric, its value, and the floor (the same number for real data against real data)."""
    if not metrics:
        return []
    width = max(len(name) for name in metrics)
    rows = [("", *COLUMNS)] + [
        (name, *(_plain(m.get(column, "")) for column in COLUMNS)) for name, m in metrics.items()
    ]
    return [f"{name:<{width}}" + "".join(f"  {cell:>10}" for cell in cells) for name, *cells in rows]


def _measured(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _entries(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries, and those one level below, under their own names."""
    for key, value in result.items():
        if isinstance(value, Mapping) and not _measured(value):
            yield from value.items()
        else:
            yield key, value


def _flatten(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if isinstance(value, Mapping) and not _measured(value):
            yield from _flatten(value, f"{prefix}{key}.")
        elif not _measured(value):
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
