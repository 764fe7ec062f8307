"""What a run tells whoever watches: which stage begins, and what they should know."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass


class FxpruneWarning(UserWarning):
    """Something that the caller should know, but that does not stop the work."""


@dataclass(frozen=True)
class Event:
    """kind  ``stage``: what ``text`` names begins now · ``warning``: the result is worth less than it could be"""

    kind: str
    text: str


OnEvent = Callable[[Event], None]


def warn_only(event: Event) -> None:
    """The default listener of the library: silent about stages, a Python warning for a warning."""
    if event.kind == "warning":
        warnings.warn(event.text, FxpruneWarning, stacklevel=4)
