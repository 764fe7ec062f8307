"""One token less: how OPTIN measures what a token is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .reducer import Reducer


@dataclass(frozen=True)
class One(Reducer):
    """Take one token away, the same of every image. For measuring alone: it is on no list.

    position   counted from the first unprotected one
    """

    position: int = 0
    name = "one"
    merges = False

    def reduce(self, taps: Any, r: int) -> Any:
        return taps.op("remove_token", taps.x, taps.size, taps.protected + self.position)
