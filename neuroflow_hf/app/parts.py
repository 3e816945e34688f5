"""What the tabs share: one job at a time with its progress, its end and its errors, and pieces of the page."""

import contextlib
import html
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..utils.files import one_line

OnStep = Callable[[str, float, float | None], None]  # takes what is done, how much of it, and the total
# of the listeners that compute: they share one queue, for they share the machine
IN_TURN: dict[str, Any] = {"concurrency_id": "jobs", "concurrency_limit": 1, "api_visibility": "private"}


class CancelledError(Exception):
    """The visitor cancelled the job, or left the page."""


class Jobs:
    """Runs the page's jobs, one after the other. Uploads and results lie in `folder`, which errors do not name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.owner: str | None = None  # the session whose job runs
        self.stop = threading.Event()

    @contextlib.contextmanager
    def job(self, request: gr.Request, progress: gr.Progress) -> Iterator[OnStep]:
        """
        A job inside the block, which calls what this gives on every step; that ends a cancelled job. Errors in what
        the visitor gave are shown on the page.
        """
        stop = self.stop = threading.Event()
        self.owner = request.session_hash

        def on_step(what: str, done: float, total: float | None):
            if stop.is_set():
                raise CancelledError
            progress(done / total if total else None, desc=what)

        try:
            on_step("loading", 0, 1)
            yield on_step
        except CancelledError:
            raise gr.Error("Nothing was kept.", title="Cancelled", print_exception=False) from None
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            raise gr.Error(self.message(error), duration=None, print_exception=False) from error
        finally:
            self.owner = None

    def cancel(self, request: gr.Request):
        """End the job of this visitor, if one runs."""
        if request.session_hash == self.owner:
            self.stop.set()

    def message(self, error: BaseException) -> str:
        """An error as HTML in one line, without the folder that the visitor does not know."""
        text = re.sub(rf"{re.escape(str(self.folder))}/(?:[^/\s]+/)*", "", one_line(error))
        return html.escape(text, quote=False)


def two_buttons(action: str) -> tuple[gr.Button, gr.Button]:
    """The buttons that begin and cancel a job, side by side on a narrow page, too."""
    return gr.Button(action, variant="primary", min_width=100), gr.Button("Cancel", min_width=100)
