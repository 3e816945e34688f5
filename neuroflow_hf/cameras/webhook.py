"""Events to an HTTP address."""

import json
import urllib.request
from collections.abc import Callable

SECONDS = 5  # for an answer


def post_json(url: str) -> Callable[[dict], None]:
    """
    A function that sends an event to an address as JSON, by POST, and raises an OSError if that does not take it.

    Raises:
        ValueError: if it is no HTTP address.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"--webhook {url} is no address; expected one that begins with http:// or https://.")

    def post(event: dict):
        body, header = json.dumps(event).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, header, method="POST")
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass

    return post
