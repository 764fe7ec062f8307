"""A search: one rung per ladder, within the limit."""

from collections.abc import Sequence

from fxprune.extend import Expression, Ladder, ledger_at


def even(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> list[int]:
    """Every group keeps the same share of its rungs: the largest share that fits."""
    for share in range(100, -1, -1):
        levels = [one.top * share // 100 for one in ladders]
        if ledger_at(terms, ladders, levels).total <= limit:
            return levels
    return [0] * len(ladders)
