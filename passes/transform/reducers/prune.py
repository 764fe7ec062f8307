"""Pruning: the tokens with the lowest scores go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import OptionError, nearest
from .reducer import Reducer

KINDS = ("class-value", "class", "entropy-value", "received-value")


@dataclass(frozen=True)
class Prune(Reducer):
    """Drop the tokens with the lowest scores (see ``ops/scores.py``).

    score   ``class-value``: how much the class token looks at it times the norm of its value (ATS); ``class``: without
            the norm (the thesis' average attention); ``entropy-value``: entropy of what it looks at times that norm
            (the thesis' diversity); ``received-value``: how much all look at it times that norm. ``auto``: class-value
            where there is a class token, else received-value

    Source  ATS: Fayyaz et al. 2022, arXiv:2111.15667, eq. 5; PPT: arXiv:2310.01812
    """

    score: str = "auto"
    name = "prune"
    merges = False

    def __post_init__(self) -> None:
        check_score(self.score)

    def reduce(self, taps: Any, r: int) -> Any:
        return taps.op("prune_tokens", taps.x, taps.score(kind_of(self.score, taps)), taps.size, r, taps.protected)


def check_score(score: str) -> None:
    """Raise OptionError for a score that is none."""
    if score not in ("auto", *KINDS):
        raise OptionError(
            f"unknown token score '{score}'", where="--tokens prune{score=}", cure=nearest(score, ("auto", *KINDS))
        )


def kind_of(score: str, taps: Any) -> str:
    """The score at a site. Raises OptionError where it needs a class token that is not there."""
    if score == "auto":
        return "class-value" if taps.protected else "received-value"
    if score.startswith("class") and not taps.protected:
        raise OptionError(
            f"the token score '{score}' needs a class token",
            where=f"site {taps.site.name}",
            why="no token stands in front of the patches",
            cure="use score=received-value",
        )
    return score
