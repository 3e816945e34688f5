"""Progress of a long command: a bar in a terminal; in a log, a line now and then."""

import time
from collections.abc import Callable

from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 15.0


class CommandProgress(Progress):
    """
    rich's progress, which shows nothing before the first update: an error should stand alone. Where the console is no
    terminal, it prints a line with what is done and the time left, every `SECONDS_BETWEEN_LINES` at most.

    Args:
        columns, options: as of [`rich.progress.Progress`].
        clock: seconds, of which only differences count.
    """

    def __init__(self, *columns, clock: Callable[[], float] = time.monotonic, **options):
        super().__init__(*columns, **options)
        self.clock = clock
        self.begun = self.last_line = clock()

    def update(self, task_id: TaskID, **changes) -> None:
        """Advance or describe a task, and show it."""
        super().update(task_id, **changes)
        if self.console.is_terminal:
            self.start()
        elif self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = self.clock()
            self.console.print(self.line(task_id), soft_wrap=True, markup=False)

    def line(self, task_id: TaskID) -> str:
        """What a task has done, of how much, and the time left."""
        task = next(task for task in self.tasks if task.id == task_id)
        if not task.total:
            return f"{task.description}: {task.completed:g}"
        if not task.completed:
            return f"{task.description}: 0 of {task.total:g}"
        left = (self.clock() - self.begun) / task.completed * (task.total - task.completed)
        minutes, seconds = divmod(round(left), 60)
        return f"{task.description}: {task.completed:g} of {task.total:g}, about {minutes}:{seconds:02d} left"

    def close(self) -> None:
        """Stop, if anything was shown; rich would print an empty line otherwise."""
        if self.live.is_started:
            self.stop()
