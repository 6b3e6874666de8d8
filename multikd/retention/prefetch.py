"""Work done ahead by threads, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_threads(
    function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int = 2
) -> Iterator[B]:
    """``map`` in order, with at most ``ahead`` finished results waiting for each thread.

    An exception of ``function`` is raised at its place. Closing the iterator (or an interruption)
    waits for the items that are being worked on and drops the rest. 0 workers: no threads.
    """
    if workers < 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="multikd-images")
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= workers * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
