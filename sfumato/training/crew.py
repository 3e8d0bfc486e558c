"""Threads that work side by side, each on one core."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")


class Crew:
    """`size` threads whose operations run on one core each; the other operations of the process keep all cores.

    Args:
        size: Number of threads.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size or 1

    def map(self, work: Callable[..., T], *arguments: Iterable[object]) -> Iterator[T]:
        """The results of `work` on each tuple of arguments, in their order."""
        return _threads(self.size).map(work, *arguments)


@cache
def _threads(size: int) -> ThreadPoolExecutor:
    """One pool for each size: threads are costly to begin, and OpenMP keeps what belongs to each."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(size, thread_name_prefix="crew", initializer=torch.set_num_threads, initargs=(1,))
    together = Barrier(size)
    list(pool.map(lambda _: together.wait(), range(size)))  # all of them have begun
    torch.set_num_threads(threads)  # which the initializers changed for threads to come
    return pool
