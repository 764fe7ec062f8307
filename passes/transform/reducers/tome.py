"""ToMe: similar tokens merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .reducer import Reducer, half


@dataclass(frozen=True)
class Tome(Reducer):
    """Bipartite soft matching on the mean keys; what merges is averaged by size (see ``ops/tome.py``).

    proportional   attention counts a token as often as it stands for; off for models that were trained with merging

    Source  Bolya et al. 2023, arXiv:2210.09461, section 3
    """

    proportional: bool = True
    name = "tome"

    @property
    def weighs(self) -> bool:
        return self.proportional

    def cap(self, tokens: int, protected: int) -> int:
        return half(tokens, protected)

    def reduce(self, taps: Any, r: int) -> Any:
        return taps.op("merge_tokens", taps.x, taps.metric(), taps.size, r, taps.protected)
