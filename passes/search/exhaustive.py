"""Try everything: the yardstick for the other searches on tiny cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...errors import OptionError
from ...ir.cost import Expression
from .ladder import Ladder, Levels, ledger_at, value_of

LIMIT = 200_000  # combinations; more than that is not a yardstick any more


def exhaustive(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> Levels:
    """The feasible rungs of greatest value; among equals the most costly, then the first in order.

    Cost     product of the ladders' rungs: tests only
    Errors   OptionError beyond 200 000 combinations
    Law      no search finds more value under the same limit
    """
    combinations = 1
    for one in ladders:
        combinations *= len(one.counts)
    if combinations > LIMIT:
        raise OptionError(
            "the exhaustive search is for tiny models",
            where="--search exhaustive",
            why=f"{combinations:.3g} combinations, the limit is {LIMIT}",
            cure="use `--search auto`",
        )
    best: tuple[float, int] | None = None
    chosen: Levels = []
    for levels in itertools.product(*(range(len(one.counts)) for one in ladders)):
        cost = ledger_at(terms, ladders, levels).total
        if cost <= limit and (best is None or (value_of(ladders, levels), cost) > best):
            best, chosen = (value_of(ladders, levels), cost), list(levels)
    return chosen
