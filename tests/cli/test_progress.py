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
    return CommandProgress("prompts", Console(file=log, **options), clock), clock, log


def test_a_log_gets_a_line_now_and_then_with_the_time_left():
    progress, clock, log = make()
    with progress:
        for done in range(1, 41):
            clock.now += 3
            progress.show("dense", done, 100)
    assert log.getvalue().splitlines() == [
        f"dense: {done} of 100, about {(100 - done) * 3 // 60}:{(100 - done) * 3 % 60:02d} left"
        for done in range(5, 41, 5)
    ]


def test_without_a_total_or_anything_done_a_line_says_what_is_known():
    progress, clock, log = make()
    for description, total in (("reading", None), ("waiting [x]", 9)):
        clock.now += 20
        progress.show(description, 0, total)
    assert log.getvalue().splitlines() == ["reading: 0", "waiting [x]: 0 of 9"]


def test_nothing_is_printed_before_anything_is_shown_and_short_work_prints_nothing_in_a_log():
    for options in ({}, {"force_terminal": True}):
        progress, _, log = make(**options)
        with progress:
            pass
        assert log.getvalue() == ""
    progress, clock, log = make()
    with progress:
        clock.now += 1
        progress.show("dense", 1, 3)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar():
    progress, _, log = make(force_terminal=True)
    with progress:
        progress.show("dense [x]", 1, 3)
    assert "dense [x]" in log.getvalue() and "prompts" in log.getvalue()


def test_an_unknown_total_replaces_a_known_one():
    progress, _, _ = make()
    progress.show("reading", 3, 9)
    progress.show("writing", 0, None)
    assert progress.tasks[0].total is None
