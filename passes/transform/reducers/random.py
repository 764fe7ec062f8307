"""The baseline: which tokens go is drawn once, for all images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .reducer import Reducer


@dataclass(frozen=True)
class Random(Reducer):
    """Drop tokens at random places. seed: of the draw."""

    seed: int = 0
    name = "random"
    merges = False

    def reduce(self, taps: Any, r: int) -> Any:
        return taps.op("drop_tokens", taps.x, taps.size, r, taps.protected, self.seed)
