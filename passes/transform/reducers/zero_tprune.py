"""Zero-TPrune: weighted PageRank on the attention graph, then similarity, then PageRank again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import OptionError
from .reducer import Reducer

MANY = 5  # iterations of the PageRank while most tokens are there


@dataclass(frozen=True)
class ZeroTprune(Reducer):
    """Drop tokens that others repeat, then those that the attention graph ranks lowest (see ``ops/zero_tprune.py``).

    similar      share of what goes that goes for similarity
    iterations   of the PageRank; 0: 5 while more than half of the tokens are left, then 1
    lowest, highest   heads whose votes vary less or more do not count (the paper: 0.01 and 0.7, of no known scale; here
                 the variance of votes with a mean of one). highest 0, the default: every head counts

    The paper takes 30 to 50 in the first layers, 5 to 10 in the middle and 1 in the last. Each reads the whole matrix,
    and 30 cost more time than the tokens save where few go. On a trained ViT (CIFAR-10, eight layers, held-out train
    images) the 20 tokens that 5 iterations rank lowest are 93 to 98 % those of 30.

    Source  Wang et al. 2024, arXiv:2305.17328, sections 3.2 to 3.4
    """

    similar: float = 0.5
    iterations: int = 0
    lowest: float = 0.0
    highest: float = 0.0
    name = "zero-tprune"
    merges = False

    def __post_init__(self) -> None:
        if not 0 <= self.similar <= 1 or self.iterations < 0:
            raise OptionError(
                "similar is a share and iterations a count",
                where="--tokens zero-tprune",
                why=f"similar={self.similar}, iterations={self.iterations}",
            )
        if not 0 <= self.lowest <= max(self.highest, 0):
            raise OptionError(
                "heads count whose variance is between lowest and highest",
                where="--tokens zero-tprune",
                why=f"lowest={self.lowest:g}, highest={self.highest:g}",
                cure="zero-tprune{lowest=0.01,highest=0.7}, or neither",
            )

    def reduce(self, taps: Any, r: int) -> Any:
        iterations = self.iterations or (MANY if taps.left > taps.site.tokens / 2 else 1)
        similar = min(round(r * self.similar), max(0, (taps.left - taps.protected) // 2 - 1))
        return taps.op(
            "pagerank_tokens",
            taps.x,
            taps.attention(),
            taps.metric(),
            taps.size,
            r,
            similar,
            taps.protected,
            iterations,
            self.lowest,
            self.highest,
        )
