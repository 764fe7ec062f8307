"""What a run tells whoever watches: which stage begins, and what they should know."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import jobs
from .journal import Journal


class FxpruneWarning(UserWarning):
    """Something that the caller should know, but that does not stop the work."""


@dataclass(frozen=True)
class Event:
    """Something that a listener may show.

    kind  ``stage``: what ``text`` names begins now · ``warning``: the result is worth less than it could be ·
          ``progress``: ``done`` of ``total`` jobs of the kind that ``text`` names are finished · ``note``: good to know
    """

    kind: str
    text: str
    done: int = 0
    total: int = 0


OnEvent = Callable[[Event], None]


def warn_only(event: Event) -> None:
    """The default listener of the library: silent about stages, a Python warning for a warning."""
    if event.kind == "warning":
        warnings.warn(event.text, FxpruneWarning, stacklevel=4)


@contextmanager
def resumable(out: str | os.PathLike[str] | None, on_event: OnEvent) -> Iterator[None]:
    """A run that tells ``on_event`` how its long work goes on, and that can be interrupted and resumed.

    out   the file or directory that the run makes: finished work is kept beside it until then; None keeps nothing

    Which run it is must be said by :func:`fxprune.jobs.identify`, before the first jobs.
    """
    journal = None if out is None else Journal(out, note=lambda text: on_event(Event("note", text)))
    with jobs.session(journal, progress=lambda name, done, total: on_event(Event("progress", name, done, total))):
        yield
