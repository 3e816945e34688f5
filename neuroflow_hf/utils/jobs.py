"""Long jobs: timed, and stopped by Ctrl-C or SIGTERM without losing what was computed."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def stop_on_interrupt(*signals: int) -> Iterator[threading.Event]:
    """
    Inside the block, the first Ctrl-C or SIGTERM, which batch systems and containers send, or the first of other
    `signals`, sets the event and interrupts nothing; the second does what it did before. Python allows this in the
    main thread only; in other threads the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in signals or (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(_signal, _frame):
        stop.set()
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of `call`, and its milliseconds, including the work of the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return result, 1000 * (time.perf_counter() - started)
