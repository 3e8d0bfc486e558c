"""When the clock of a budget starts."""

import time

STARTED = time.monotonic()  # imports and reading are part of what the user waits for
STALE = 30.0  # seconds after which the process was not started for the sake of this run
_used: list[bool] = []


def begin() -> float:
    """Now (`time.monotonic`); of a process's first run the process's start, which charges it with the imports."""
    start = STARTED if time.monotonic() - STARTED < STALE and not _used else time.monotonic()
    _used.append(True)
    return start
