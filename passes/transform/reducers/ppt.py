"""PPT: every image decides whether to prune or to merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .prune import check_score, kind_of
from .reducer import Reducer, half


@dataclass(frozen=True)
class Ppt(Reducer):
    """Prune where the scores of an image's tokens differ much, merge where they do not (see ``ops/ppt.py``).

    score       as of ``prune``
    threshold   squared coefficient of variation of the scores at all tokens from which an image prunes. The paper's
                tau = 7e-5 is a variance of scores that sum to one: at 197 tokens it is 2.69 = tau (T - 1)^2, and where
                fewer are left it is as much less as their number squared (1.49 at 147, 0.65 at 97). Written this way it
                carries over to other token counts; ``fixed`` keeps it where it is

    Source  Wu et al. 2023, arXiv:2310.01812, eq. 3 and 4
    """

    score: str = "auto"
    threshold: float = 2.69
    fixed: bool = False
    name = "ppt"

    def __post_init__(self) -> None:
        check_score(self.score)

    def cap(self, tokens: int, protected: int) -> int:
        return half(tokens, protected)

    def reduce(self, taps: Any, r: int) -> Any:
        here, whole = taps.left - taps.protected, taps.site.tokens - taps.protected
        threshold = self.threshold if self.fixed else self.threshold * (here / whole) ** 2
        score = taps.score(kind_of(self.score, taps))
        return taps.op("adapt_tokens", taps.x, taps.metric(), score, taps.size, r, taps.protected, threshold)
