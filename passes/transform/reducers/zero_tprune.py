"""Zero-TPrune: weighted PageRank on the attention graph, then similarity, then PageRank again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import OptionError
from .reducer import Reducer


@dataclass(frozen=True)
class ZeroTprune(Reducer):
    """Drop tokens that others repeat, then those that the attention graph ranks lowest (see ``ops/zero_tprune.py``).

    similar      share of what goes that goes for similarity
    iterations   of the PageRank; 0: 30 at the first site with all tokens, 5 in the middle, 1 when few are left, the
                 paper's schedule by depth told by the share of tokens left

    Source  Wang et al. 2024, arXiv:2305.17328, sections 3.2 to 3.4
    """

    similar: float = 0.5
    iterations: int = 0
    name = "zero-tprune"
    merges = False

    def __post_init__(self) -> None:
        if not 0 <= self.similar <= 1 or self.iterations < 0:
            raise OptionError("similar is a share and iterations a count", where="--tokens zero-tprune",
                              why=f"similar={self.similar}, iterations={self.iterations}")

    def reduce(self, taps: Any, r: int) -> Any:
        share = taps.left / taps.site.tokens
        iterations = self.iterations or (30 if share > 0.9 else 5 if share > 0.5 else 1)
        similar = min(round(r * self.similar), max(0, (taps.left - taps.protected) // 2 - 1))
        return taps.op("pagerank_tokens", taps.x, taps.attention(), taps.metric(), taps.size, r, similar,
                       taps.protected, iterations)
