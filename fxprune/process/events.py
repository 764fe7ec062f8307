"""What a run tells whoever watches: which stage begins, and what they should know."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass


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
