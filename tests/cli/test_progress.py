import io

from rich.console import Console

from neuroflow_hf.cli.progress import CommandProgress


class Clock:
    """A clock that stands still unless it is put forward."""

    now = 100.0

    def __call__(self):
        return self.now


def make(**options):
    clock, log = Clock(), io.StringIO()
    return CommandProgress(console=Console(file=log, **options), clock=clock), clock, log


def test_a_log_gets_a_line_now_and_then_with_the_time_left():
    progress, clock, log = make()
    task = progress.add_task("prompts", total=100)
    for done in range(1, 41):
        clock.now += 3
        progress.update(task, completed=done)
    progress.close()
    assert log.getvalue().splitlines() == [
        f"prompts: {done} of 100, about {(100 - done) * 3 // 60}:{(100 - done) * 3 % 60:02d} left"
        for done in range(5, 41, 5)
    ]


def test_without_a_total_or_anything_done_a_line_says_what_is_known():
    progress, clock, log = make()
    reading, waiting = progress.add_task("reading", total=None), progress.add_task("waiting [x]", total=9)
    for task in (reading, waiting):
        clock.now += 20
        progress.update(task, completed=0)
    assert log.getvalue().splitlines() == ["reading: 0", "waiting [x]: 0 of 9"]


def test_nothing_is_printed_before_the_first_update_and_short_work_prints_nothing_in_a_log():
    for options in ({}, {"force_terminal": True}):
        progress, _, log = make(**options)
        task = progress.add_task("frames", total=3)
        progress.close()
        assert log.getvalue() == ""
    progress, clock, log = make()
    task = progress.add_task("frames", total=3)
    clock.now += 1
    progress.update(task, advance=1)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar():
    progress, _, log = make(force_terminal=True)
    progress.update(progress.add_task("frames", total=3), advance=1)
    progress.close()
    assert "frames" in log.getvalue()
