"""A thread for each source, which keeps its newest picture."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from ..utils.files import one_line
from .sources import Picture, Source

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a lost source is tried again; doubled each time


@dataclass(frozen=True, eq=False)
class Arrival:
    """The newest picture of a source, and when it arrived, in seconds of the monotonic clock."""

    picture: Picture
    arrived: float


class LatestPictures:
    """
    The newest picture of each source, as of `open_sources`. A picture that nobody took before the next one came is
    dropped, so the picture that `take` gives is never older than the time that its caller needs for one round.
    """

    def __init__(self, sources: Mapping[str, tuple[Source, bool]]):
        self.received, self.dropped = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0)
        self.running = len(sources)
        self.changed, self.stop = threading.Condition(), threading.Event()
        self.arrivals: dict[str, Arrival] = {}
        self.events: list[dict] = []
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

    def take(self, timeout: float) -> tuple[list[dict], dict[str, Arrival]]:
        """
        Events since the last call, `connected`, `lost` or `ended`, and new pictures by source. Waits for at most
        `timeout` seconds.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.arrivals or self.events or not self.running, timeout)
            events, arrivals = self.events, self.arrivals
            self.events, self.arrivals = [], {}
        return events, arrivals

    @property
    def all_ended(self) -> bool:
        """Whether all sources ended, and nothing is left to take."""
        with self.changed:
            return not (self.running or self.arrivals or self.events)

    def _run(self, name: str, source: Source, live: bool):
        """What the thread of a source does."""
        pause = FIRST_PAUSE
        while not self.stop.is_set():
            reason, connected = "", False
            try:
                for picture in source():
                    if not connected:
                        connected, pause = True, FIRST_PAUSE
                        self._post("connected", name)
                    self._put(name, picture)
                    if self.stop.is_set():
                        return
            except Exception as error:  # cameras fail in all kinds of ways, and the others go on
                reason = one_line(error)
            if not live:
                with self.changed:
                    self.running -= 1
                    self._post("ended", name, **{"reason": reason} if reason else {})
                return
            self._post("lost", name, reason=reason or "it ended", retry_seconds=pause)
            self.stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _put(self, name: str, picture: Picture):
        with self.changed:
            self.received[name] += 1
            self.dropped[name] += name in self.arrivals
            self.arrivals[name] = Arrival(picture, time.monotonic())
            self.changed.notify()

    def _post(self, kind: str, name: str, **more):
        with self.changed:
            self.events.append({"event": kind, "source": name, "time": stamp(time.time()), **more})
            self.changed.notify()


def stamp(seconds: float) -> str:
    """A time since 1970 as ISO 8601 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
