"""What a run tells whoever watches: which stage begins, and what they should know."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import spell


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


class Transcript:
    """What one run told: every event is handed on, and what its report repeats is kept.

    notes   the warnings and notes so far, in order
    """

    def __init__(self, on_event: OnEvent, notes: tuple[str, ...] = ()) -> None:
        self.on_event, self.notes = on_event, notes

    def __call__(self, event: Event) -> None:
        """Hand an event on; nothing is kept of it."""
        self.on_event(event)

    def stage(self, text: str) -> None:
        """What begins now."""
        self.on_event(Event("stage", text))

    def warn(self, text: str) -> None:
        """The result is worth less than it could be; kept."""
        self._keep("warning", text)

    def note(self, text: str) -> None:
        """Good to know; kept."""
        self._keep("note", text)

    def branch(self) -> Transcript:
        """Another transcript for the same listener, which begins with the same notes."""
        return Transcript(self.on_event, self.notes)

    def _keep(self, kind: str, text: str) -> None:
        text = spell(text)
        self.notes = (*self.notes, text)
        self.on_event(Event(kind, text))
