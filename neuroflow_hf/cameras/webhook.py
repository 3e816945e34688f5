"""Events to an HTTP address, sent by a thread."""

import base64
import contextlib
import json
import queue
import threading
import time
import urllib.request
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from ..utils.files import one_line
from .sources import source_name

SECONDS = 5  # for an answer, and at the end for all that wait
MOST_WAITING = 1000  # events for an address that is slower than they come


def post_json(url: str) -> Callable[[dict], None]:
    """
    A function that sends an event to an address as JSON, by POST, and raises an OSError if that does not take it. User
    and password before the host are sent as basic authentication. ValueError if it is no HTTP address.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:  # a port that is no number; the message may show a password
        valid = False
    if not valid or " " in url:
        raise ValueError(
            f"--webhook {source_name(url)} is no address; expected one that begins with http:// or https://."
        )
    user, _, host = parts.netloc.rpartition("@")
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
    address = parts._replace(netloc=host, fragment="").geturl()

    def post(event: dict):
        request = urllib.request.Request(address, json.dumps(event).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass

    return post


class Webhook:
    """
    Sends events by `post_json`, one after the other, in a thread: an address that answers slowly delays nothing.
    Events that come while `MOST_WAITING` wait have failed.
    """

    def __init__(self, send: Callable[[dict], None]):
        self.send = send
        self.sent, self.failed, self.reason = 0, 0, ""  # the reason is that of the last failure
        self.waiting: queue.Queue = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._run, name="neuroflow-webhook", daemon=True)
        self.thread.start()

    def post(self, event: dict):
        """Send an event when those before it are sent."""
        try:
            self.waiting.put_nowait(event)
        except queue.Full:
            self.failed, self.reason = self.failed + 1, f"{MOST_WAITING} events wait already"

    def close(self):
        """Send what waits, for at most `SECONDS`, and end the thread."""
        until = time.monotonic() + SECONDS
        while self.waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.02)
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait(None)

    def _run(self):
        while (event := self.waiting.get()) is not None:
            try:
                self.send(event)
                self.sent += 1
            except Exception as error:
                self.failed, self.reason = self.failed + 1, one_line(error)
            self.waiting.task_done()
