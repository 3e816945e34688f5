"""Long jobs: timed, and stopped by Ctrl-C without losing what was computed."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """
    Inside the block, the first Ctrl-C sets the event and interrupts nothing; the second does what it did before.
    Python allows this in the main thread only; in other threads the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def handle(_signal, _frame):
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of `call`, and its milliseconds, including the work of the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return result, 1000 * (time.perf_counter() - started)
