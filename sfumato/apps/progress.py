"""Progress of a task: a bar on a terminal, occasional lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

SECONDS_BETWEEN_LINES = 10.0


def format_seconds(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_values(values: Mapping[str, float]) -> str:
    """`{"eta": 75, "loss": 0.1234, "items/s": 1890}` as `eta 1:15  loss 0.1234  1890 items/s`.

    `eta` and `took` are seconds, names that start with `of` are shares; integers are written in full.
    """
    return "  ".join(format_value(name, value) for name, value in values.items())


def format_value(name: str, value: float) -> str:
    """A value with its name or unit."""
    if name in ("eta", "took"):
        return f"{name} {format_seconds(value)}"
    if name.startswith("of "):
        return f"{100 * value:.2g} % {name}"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{text} {name}" if name in ("steps", "items") or name.endswith("/s") else f"{name} {text}"


class ProgressLine:
    """The progress callback of the command line, a context manager.

    Tasks call `progress(stage, done, total, values)`; `values` are shown after the bar, such as `eta` in seconds.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.interactive = sys.stderr.isatty()
        self.stage = ""
        self.printed_at = 0.0
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int, values: Mapping[str, float] | None = None) -> None:
        """Show that `done` of `total` is done in `stage`."""
        if self.quiet:
            return
        text = format_values(values or {})
        if self.interactive:
            self._update_bar(stage, done, total, text)
        else:
            self._print_line(stage, done, total, text)
        self.stage = stage

    def _update_bar(self, stage: str, done: int, total: int, text: str) -> None:
        if self.bar is None:
            self.bar = make_bar()
            self.bar.start()
        if stage != self.stage:
            self.task = self.bar.add_task(stage, total=total, text=text)
        self.bar.update(self.task, completed=done, total=total, text=text)

    def _print_line(self, stage: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if stage == self.stage and done < total and now - self.printed_at < SECONDS_BETWEEN_LINES:
            return
        self.printed_at = now
        percent = 100 * done // max(total, 1)
        print(f"{stage:<12} {percent:3d} %  {text}".rstrip(), file=sys.stderr, flush=True)


def make_bar() -> Any:
    """A progress bar of rich on the error stream, so that the command's output can be piped."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}")
    return Progress(*columns, console=Console(stderr=True))
