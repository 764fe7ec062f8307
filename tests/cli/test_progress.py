"""What people see of long work: bars on a terminal, few lines elsewhere, nothing when they ask for quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fxprune.cli.progress import Progress, pace
from fxprune.cli.screen import Screen
from fxprune.process.events import Event, warn_only
from fxprune.process.jobs import resumable, run_jobs


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_is_a_rate_and_the_time_left() -> None:
    assert pace(64, 128, 16.0) == "4/s, 0:32 left"
    assert pace(2, 3, 60.0) == "30 s each, 1:30 left"
    assert pace(1, 10, 3600.0) == "3.6e+03 s each, 10:00:00 left"
    assert pace(0, 10, 5.0) == ""


def test_without_a_terminal_a_line_every_ten_seconds() -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress(Console(file=file, width=100), clock)
    for second in range(41):
        clock.now = float(second)
        progress.tell("fisher[a]", 10 + second, 50)
    lines = file.getvalue().splitlines()
    assert lines == [f"  fisher[a]  {10 + s} of 50, 1/s, 0:{40 - s} left" for s in (10, 20, 30)]  # 40: it is done


def test_on_a_terminal_a_bar_that_goes_away() -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress(Console(file=file, width=100, force_terminal=True), clock)
    progress.tell("fisher", 4, 8)
    clock.now = 3.0
    progress.tell("fisher", 6, 8)
    progress.bars.refresh()
    progress.stop()
    text = file.getvalue()
    for word in ("fisher", "6/8", "1.5 s each, 0:03 left"):
        assert word in text
    assert progress.bars is None


def test_the_screen_draws_one_live_thing_at_a_time() -> None:
    screen, file = Screen(), io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, highlight=False)
    screen.console = screen.progress.console = console
    with screen:
        for kind, name, done in (
            ("stage", "score groups", 0),
            ("progress", "fisher", 0),
            ("progress", "fisher", 2),
            ("note", "resumed: [some]", 0),
            ("stage", "search plan", 0),
            ("progress", "x", 1),
        ):
            screen.tell(Event(kind, name, done, 2))
    assert "resumed: [some]" in file.getvalue()
    assert screen.progress.bars is None


def test_a_quiet_screen_shows_no_progress_and_nothing_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with Screen(quiet=quiet) as screen:
            screen.progress.clock = clock = Clock()
            for done in range(3):
                clock.now += 100
                screen.tell(Event("progress", "fisher", done, 9))
            screen.tell(Event("note", "resumed"))
        out, err = capsys.readouterr()
        assert out == ""
        assert ("fisher" in err, "resumed" in err) == (not quiet, not quiet)


def test_events_carry_done_and_total_and_the_library_stays_silent(recwarn: pytest.WarningsRecorder) -> None:
    events: list[Event] = []
    with resumable(None, events.append):
        run_jobs("fisher", 2, lambda _: {})
    assert events == [Event("progress", "fisher", done, 2) for done in range(3)]
    for event in events:
        warn_only(event)
    assert not recwarn.list
