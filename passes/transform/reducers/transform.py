"""Token Transforming: every token that goes gives shares of itself to those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import OptionError
from .prune import check_score, kind_of
from .reducer import Reducer


@dataclass(frozen=True)
class Transforming(Reducer):
    """Many-to-many merging into representatives (see ``ops/transform.py``).

    score         which tokens represent the others, as of ``prune``
    temperature   of the softmax over representatives: near 0 every token goes whole to the nearest one

    Source  Token Transforming, arXiv:2506.05709: the matrix form; how its matrix is made could not be read, ours is
            a softmax over cosines of the mean keys, columns summing to one, so that mass is kept, and representatives
            keep themselves
    """

    score: str = "auto"
    temperature: float = 0.05
    name = "transform"

    def __post_init__(self) -> None:
        check_score(self.score)
        if not self.temperature > 0:
            raise OptionError(
                "the temperature must be positive",
                where="--tokens transform{temperature=}",
                why=f"it is {self.temperature}",
            )

    def reduce(self, taps: Any, r: int) -> Any:
        score = taps.score(kind_of(self.score, taps))
        return taps.op("transform_tokens", taps.x, taps.metric(), score, taps.size, r, taps.protected, self.temperature)
