"""Long work, cut into jobs whose results are added up in one fixed order, whoever computed them and when.

    for found in run_jobs("fisher", len(batches), lambda i: {"head": score(batches[i])}):
        total += found["head"]

The order of the results is that of the jobs, so that sums do not depend on how the work was shared: one process and
many, interrupted or not, give the same bits.

Inside a :func:`session` jobs report their progress and are kept aside as they finish; the next run of the same
fingerprint computes the rest. Between ranks (:mod:`fxprune.process.ranks`) they are shared.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from . import jobs, ranks
from .events import Event, OnEvent
from .journal import Journal

Result: TypeAlias = dict[str, Tensor]
OnProgress: TypeAlias = Callable[[str, int, int], None]


def run_jobs(name: str, count: int, work: Callable[[int], Result]) -> list[Result]:
    """Results of jobs 0..count-1, in that order, on every rank.

    name   of this kind of work (``trajectory.heads``): people read it, and it keys what is stored. A second call with
           the same name in one run is stored as another one, so calls must come in the same order every time
    work   job number -> tensors by name; must depend on nothing but the number, and move its tensors to the CPU

    Raises what ``work`` raises; with several ranks, on all of them with the words of the first that failed.
    """
    session = _session.get()
    if _inside.get() or (session is None and ranks.world() == 1):
        return [work(i) for i in range(count)]
    session = session or _Session()
    session.calls[name] += 1
    place = name if session.calls[name] == 1 else f"{name}#{session.calls[name]}"
    return _share(session, place, count, work)


@contextlib.contextmanager
def session(journal: Journal | None = None, progress: OnProgress | None = None) -> Iterator[None]:
    """One run: every ``run_jobs`` inside it reports to ``progress`` and stores what is finished in ``journal``.

    journal    where finished jobs are kept, once :func:`identify` has said which run this is. It is removed when the
               block ends; it stays when the run is interrupted, and after an error if it holds much work
    progress   called with (name, jobs done, jobs in all) when jobs begin and as they finish

    Ctrl-C inside the block comes out as KeyboardInterrupt, with what to do next as its text if finished jobs are kept.
    """
    here = _Session(journal if ranks.rank() == 0 else None, progress)
    token = _session.set(here)
    try:
        yield
    except KeyboardInterrupt:
        with _ignore_signals():
            kept = here.journal.close(keep=True) if here.journal is not None else None
        if kept is None:
            raise
        raise KeyboardInterrupt(
            f"interrupted; finished scoring is kept in {kept}, the same command goes on from there"
        ) from None
    except BaseException as error:
        if here.journal is not None:
            here.journal.close(keep=isinstance(error, ranks.LostRank) or here.journal.worth_keeping)
        raise
    else:
        if here.journal is not None:
            here.journal.close(keep=False)
    finally:
        _session.reset(token)


@contextlib.contextmanager
def _ignore_signals() -> Iterator[None]:
    """A second Ctrl-C waits (people are impatient, and torchrun passes on what the terminal sent already)."""
    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread: no signal arrives here
        previous = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def identify(fingerprint: Callable[[], str]) -> None:
    """Say which run this session is, by its fingerprint (``data/fingerprint.py``); asked for when the first jobs begin.

    Without a session, or in one without a journal, nothing happens.
    """
    here = _session.get()
    if here is not None:
        here.fingerprint = fingerprint


def forget_identity() -> None:
    """The run is no longer the one that it was said to be (its data changed): nothing more is kept or looked for."""
    here = _session.get()
    if here is not None:
        here.fingerprint, here.opened = None, False


@dataclass
class _Session:
    """What one run knows: ``calls`` counts the uses of each name, ``fingerprint`` waits for the first jobs."""

    journal: Journal | None = None
    progress: OnProgress | None = None
    fingerprint: Callable[[], str] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    opened: bool = False

    def find(self, place: str, count: int) -> dict[int, Result]:
        if self.journal is None or self.fingerprint is None:
            return {}
        if not self.opened:
            self.journal.open(self.fingerprint())
            self.opened = True
        return self.journal.find(place, count)

    def keep(self, place: str, count: int, number: int, result: Result, seconds: float) -> None:
        if self.journal is not None and self.opened:
            self.journal.add(place, count, number, result, seconds)


_session: contextvars.ContextVar[_Session | None] = contextvars.ContextVar("session", default=None)
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)  # a job runs jobs of its own


def _share(session: _Session, place: str, count: int, work: Callable[[int], Result]) -> list[Result]:
    """In rounds of one job per rank: an error is known to all after a round, and one rank can keep what all found."""
    done = _find_done(session, place, count)
    if done and session.journal is not None:
        session.journal.note(f"resumed: {len(done)} of {count} jobs of {place} were found")
    todo = [i for i in range(count) if i not in done]
    tell = session.progress or (lambda *_: None)
    tell(place, len(done), count)
    for start in range(0, len(todo), ranks.world()):
        numbers = todo[start : start + ranks.world()]
        began = time.monotonic()
        results = _round(f"{place} {count}: {numbers}", numbers, work)
        seconds = time.monotonic() - began
        for number, result in zip(numbers, results, strict=True):
            done[number] = result
            session.keep(place, count, number, result, seconds / len(numbers))
        tell(place, len(done), count)
    return [done[i] for i in range(count)]


def _find_done(session: _Session, place: str, count: int) -> dict[int, Result]:
    """What was finished before, by the first rank's journal."""
    found = session.find(place, count)
    if ranks.world() == 1:
        return found
    sent = {f"{i}/{name}": t for i, result in found.items() for name, t in result.items()}
    tensors, about = ranks.exchange(f"{place} {count}", sent, {"jobs": list(found)})[0]
    known: dict[int, Result] = {int(i): {} for i in about["jobs"]}
    for label, tensor in tensors.items():
        number, _, name = label.partition("/")
        known[int(number)][name] = tensor
    return known


def _round(step: str, numbers: list[int], work: Callable[[int], Result]) -> list[Result]:
    """The results of ``numbers``, of which this rank computes one or none."""
    result: Result = {}
    failure: Exception | None = None
    token = _inside.set(True)
    try:
        if ranks.rank() < len(numbers):
            result = work(numbers[ranks.rank()])
    except Exception as error:
        if ranks.world() == 1:
            raise
        failure = error
    finally:
        _inside.reset(token)
    if ranks.world() == 1:
        return [result]
    return [tensors for tensors, _ in ranks.exchange(step, result, failure=failure)[: len(numbers)]]


@contextmanager
def resumable(out: str | os.PathLike[str] | None, on_event: OnEvent) -> Iterator[None]:
    """A run that tells ``on_event`` how its long work goes on, and that can be interrupted and resumed.

    out   the file or directory that the run makes: finished work is kept beside it until then; None keeps nothing

    Which run it is must be said by :func:`fxprune.process.jobs.identify`, before the first jobs.
    """
    journal = None if out is None else Journal(out, note=lambda text: on_event(Event("note", text)))
    with jobs.session(journal, progress=lambda name, done, total: on_event(Event("progress", name, done, total))):
        yield
