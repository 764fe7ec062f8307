"""One budget for kinds that no ledger prices together: each share of it is tried, and measured.

A search adds up what elements are worth (``passes/search/ladder.py``). What a token, or a tile, is worth is told in
another unit, and on another graph: tokens go before groups are priced, tiles are those of the weights that slicing
leaves. So such a kind takes a share of what the budget takes away, the search over the other kinds the rest, and which
share is asked of the outputs. A kind of this sort needs a function that makes the result at a share, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import BudgetInfeasible

Made = TypeVar("Made")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what the budget takes away


@dataclass(frozen=True)
class Trial(Generic[Made]):
    """What was made where a kind takes ``share``, and how far its outputs lie from the dense ones."""

    share: float
    distance: float
    made: Made


def try_shares(
    shares: Sequence[float], make: Callable[[float], Made], measure: Callable[[Made], float]
) -> list[Trial[Made]]:
    """A trial of every share that is within reach, in their order. A single share is not measured.

    Raises the first share's BudgetInfeasible where none is within reach.

    >>> [trial.distance for trial in try_shares((0.5, 1.0), lambda share: 2 * share, lambda made: made - 1)]
    [0.0, 1.0]
    """
    found: list[Trial[Made]] = []
    failed: BudgetInfeasible | None = None
    for share in shares:
        try:
            made = make(share)
        except BudgetInfeasible as why:
            failed = failed or why
            continue
        found.append(Trial(share, measure(made) if len(shares) > 1 else 0.0, made))
    if failed is not None and not found:
        raise failed
    return found


def nearest(trials: Sequence[Trial[Made]]) -> Trial[Made]:
    """The trial whose outputs are closest to the dense ones; of equals that with the least share."""
    return min(trials, key=lambda one: (one.distance, one.share))
