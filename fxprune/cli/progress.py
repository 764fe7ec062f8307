"""How long work goes on: a bar on a terminal, a line now and then elsewhere. With the rate, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0  # seconds between lines where there is no terminal; work shorter than that prints none


@dataclass
class _Work:
    """One kind of jobs on display: it was at ``first`` when it began, so what was resumed does not count as speed."""

    first: int
    began: float
    told: float
    task: Any = None


class Progress:
    """What :class:`fxprune.cli.screen.Screen` shows of ``progress`` events."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console, self.clock = console, clock
        self.bars: Any = None
        self.works: dict[str, _Work] = {}

    def tell(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` jobs called ``name`` are finished."""
        now = self.clock()
        work = self.works.setdefault(name, _Work(done, now, now))
        words = pace(done - work.first, total - done, now - work.began)
        if self.console.is_terminal:
            self._draw(work, name, done, total, words)
        elif now - work.told >= EVERY and done < total:
            work.told = now
            self.console.print(
                f"  {name}  {done} of {total}{', ' + words if words else ''}", markup=False, soft_wrap=True
            )

    def _draw(self, work: _Work, name: str, done: int, total: int, words: str) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        if self.bars is None:
            plain = [
                TextColumn(t, markup=False)
                for t in ("{task.description}", "{task.fields[count]}", "{task.fields[words]}")
            ]
            self.bars = Bars(plain[0], BarColumn(), *plain[1:], console=self.console, transient=True)
            self.bars.start()
        if work.task is None:
            work.task = self.bars.add_task(name, total=total, completed=done, count="", words="")
        self.bars.update(work.task, completed=done, total=total, count=f"{done}/{total}", words=words)

    def stop(self) -> None:
        """Take the bars away; the next event begins anew."""
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.works = None, {}


def pace(done: int, left: int, seconds: float) -> str:
    """Rate and time left after ``done`` jobs in ``seconds``, with ``left`` to do; "" while nothing is known.

    >>> pace(64, 128, 16.0), pace(2, 3, 60.0), pace(0, 3, 5.0)
    ('4/s, 0:32 left', '30 s each, 1:30 left', '')
    """
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    minutes, rest = divmod(round(left / rate), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{f'{rate:.3g}/s' if rate >= 1 else f'{1 / rate:.3g} s each'}, {clock} left"
