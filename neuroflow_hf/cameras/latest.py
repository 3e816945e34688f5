"""A thread for each source, which keeps its newest picture."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from .sources import Picture, Source, reason_of

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a lost source is tried again; doubled each time


@dataclass(frozen=True, eq=False)
class Arrival:
    """The newest picture of a source, and when it arrived, in seconds of the monotonic clock."""

    picture: Picture
    arrived: float


@dataclass(frozen=True)
class Change:
    """What happened to a source: `"connected"`, `"lost"` or `"ended"`."""

    source: str  # its name
    kind: str  # of these
    reason: str = ""  # why it was lost, or ended
    pause: float = 0.0  # seconds until it is tried again
    at: float = field(default_factory=time.time, compare=False)  # when, in seconds since 1970


class LatestPictures:
    """
    The newest picture of each source, as of `open_sources`. A picture that nobody took before the next one came is
    dropped, so the picture that `take` gives is never older than the time that its caller needs for one round.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[Source, bool]],
        first_pause: float = FIRST_PAUSE,
        longest_pause: float = LONGEST_PAUSE,
    ):
        self.pauses = first_pause, longest_pause
        self.received, self.dropped = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0)
        self.running = len(sources)
        self.changed, self.stop = threading.Condition(), threading.Event()
        self.arrivals: dict[str, Arrival] = {}
        self.changes: list[Change] = []
        self.threads = [
            threading.Thread(target=self._run, args=(name, *source), name=f"neuroflow-{name}", daemon=True)
            for name, source in sources.items()
        ]

    def __enter__(self) -> "LatestPictures":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Stop all threads; one that waits for a camera is left alone after a second."""
        self.stop.set()
        until = time.monotonic() + 1
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))

    def take(self, timeout: float) -> tuple[list[Change], dict[str, Arrival]]:
        """What happened since the last call, in order, and the new pictures by source; waits for at most `timeout`."""
        with self.changed:
            self.changed.wait_for(lambda: self.arrivals or self.changes or not self.running, timeout)
            changes, arrivals = self.changes, self.arrivals
            self.changes, self.arrivals = [], {}
        return changes, arrivals

    @property
    def all_ended(self) -> bool:
        """Whether all sources ended, and nothing is left to take."""
        with self.changed:
            return not (self.running or self.arrivals or self.changes)

    def _run(self, name: str, source: Source, live: bool):
        """What the thread of a source does."""
        pause, longest = self.pauses
        while not self.stop.is_set():
            reason, connected = "", False
            try:
                for picture in source():
                    if not connected:
                        connected, pause = True, self.pauses[0]
                        self._post(Change(name, "connected"))
                    self._put(name, picture)
                    if self.stop.is_set():
                        return
            except Exception as error:  # cameras fail in all kinds of ways, and the others go on
                reason = reason_of(error)
            if not live:
                with self.changed:
                    self.running -= 1
                    self._post(Change(name, "ended", reason))
                return
            self._post(Change(name, "lost", reason or "it ended", pause))
            self.stop.wait(pause)
            pause = min(2 * pause, longest)

    def _put(self, name: str, picture: Picture):
        with self.changed:
            self.received[name] += 1
            self.dropped[name] += name in self.arrivals
            self.arrivals[name] = Arrival(picture, time.monotonic())
            self.changed.notify()

    def _post(self, change: Change):
        with self.changed:
            self.changes.append(change)
            self.changed.notify()
