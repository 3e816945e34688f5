"""A thread that works ahead of its consumer."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(iterable: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Run `iterable` ahead of its consumer in one background thread.

    The thread starts with the first item asked for. An exception in `iterable` is raised in the consumer after all
    items that came before it. Closing the generator stops and joins the thread; a `for` loop left by `break` or an
    exception closes it when the generator is dropped, `with contextlib.closing(prefetch(...))` closes it at once.

    Args:
        iterable: what to run ahead, for example decoding and preprocessing. It is used by the thread only, and its
            `close()`, if it has one, is called there.
        depth: how many items may wait, at least 1. 4 smooths out key frames; more only costs memory.

    Raises:
        ValueError: `depth` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be 1 or more, got {depth}")
    return _prefetch(iterable, depth)


def _prefetch(iterable: Iterable[T], depth: int) -> Iterator[T]:
    """The generator behind `prefetch`."""
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def produce():
        error = None
        try:
            iterator = iter(iterable)
            try:
                for item in iterator:
                    waiting.put((item, None))
                    if stop.is_set():
                        break
            finally:
                if hasattr(iterator, "close"):
                    iterator.close()
        except BaseException as raised:
            error = raised
        if not stop.is_set():
            waiting.put((end, error))

    thread = threading.Thread(target=produce, name="neuroflow-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        # The thread may be inside put(). It looks at `stop` before it puts again, so one free place lets it go.
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        thread.join()
