"""What all tests share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def default_interrupts() -> Iterator[None]:
    """Ctrl-C interrupts, in this process and its children, even where the shell that started it ignores the signal.

    A shell script ignores SIGINT in what it starts in the background, and processes inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
