"""Progress of a long command on stderr: a bar in a terminal, a line now and then in a log."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class CommandProgress(Progress):
    """
    The progress of one task. Nothing is shown before the first `show`, so that an error stands alone. Where the
    console (default: stderr) is not a terminal, a line with what is done and the time left is printed every
    `SECONDS_BETWEEN_LINES`. `unit` is what is counted, such as `"frames"`.
    """

    def __init__(self, unit: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True, highlight=False),
            transient=True,
        )
        self.task_id, self.clock = self.add_task("", total=None), clock
        self.begun = self.last_line = clock()

    def __enter__(self) -> "CommandProgress":
        return self

    def __exit__(self, *_) -> None:
        if self.live.is_started:  # otherwise, `stop` would print an empty line
            self.stop()

    def show(self, description: str, done: float, total: float | None) -> None:
        """Show the current step, and what is done of the total (None if it is unknown)."""
        self.update(self.task_id, description=description, completed=done, total=total)
        self.tasks[0].total = total  # `update` keeps the old total for None
        if self.console.is_terminal:
            self.start()
        elif self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = self.clock()
            self.console.print(self.line(description, done, total), soft_wrap=True, markup=False)

    def line(self, description: str, done: float, total: float | None) -> str:
        """A line of the log."""
        if not total:
            return f"{description}: {done:g}"
        if not done:
            return f"{description}: 0 of {total:g}"
        left = (self.clock() - self.begun) / done * (total - done)
        minutes, seconds = divmod(round(left), 60)
        return f"{description}: {done:g} of {total:g}, about {minutes}:{seconds:02d} left"
