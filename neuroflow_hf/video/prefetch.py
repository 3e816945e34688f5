"""A thread that works ahead of its consumer."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(iterable: Iterable[T], depth: int = 4) -> Iterator[T]:
    """
    Run `iterable` ahead of its consumer in one background thread.

    The thread starts with the first item asked for, and also closes the iterator. An exception is raised in the
    consumer after all items that came before it. Closing the generator joins the thread; use `contextlib.closing`.
    `depth` items may be ahead, at least 1: 4 smooths out keyframes, and more only costs memory.
    """
    iterator, end = iter(iterable), object()
    with ThreadPoolExecutor(1, "neuroflow-prefetch") as thread:
        ahead = deque(thread.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(thread.submit(next, iterator, end))
                yield item
        finally:
            for future in ahead:
                future.cancel()
            if hasattr(iterator, "close"):
                with contextlib.suppress(RuntimeError):  # when the interpreter exits, no thread takes anything
                    thread.submit(iterator.close).result()
