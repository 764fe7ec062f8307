"""Spend what a search left over: the last step of every search."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from ...ir.cost import Ledger
from .ladder import Ladder, Levels


def fill(ladders: Sequence[Ladder], levels: Levels, book: Ledger, limit: float) -> None:
    """Climb rungs in place, best value per cost first, until none fits. What does not fit now never will: costs grow.

    Each ladder offers one climb at a time: to the rung of the greatest value per element above the one it is on, which
    is the next one where values are concave. An offer that does not fit is replaced by one to a lower rung.

    book   the ledger at ``levels``; moved along with them
    Law    afterwards no single rung more fits; a tighter limit never costs more, and from the same start never gains
           more: the offers do not depend on the limit up to the first that only the wider limit takes
    """
    below = [one.top + 1 for one in ladders]  # the rungs from here on are known not to fit
    bent = [not one.concave for one in ladders]

    def offer(i: int) -> tuple[float, float, int, int]:
        """(minus value per cost, kept share, ladder, rung)"""
        one, level = ladders[i], levels[i]
        rung = level + 1
        if bent[i]:
            rung = max(range(rung, below[i]), key=lambda r: (one.slope(level, r), -r))
        cost = one.change(book, rung)
        value = one.values[rung] - one.values[level]
        return -(value / cost) if cost > 0 else -math.inf, one.counts[level] / one.counts[-1], i, rung

    heap = [offer(i) for i in range(len(ladders)) if levels[i] + 1 < below[i]]
    heapq.heapify(heap)
    while heap:
        i, rung = heap[0][2:]
        fresh = offer(i)
        if fresh > heap[0]:  # its cost grew since it was asked: back into the queue
            heapq.heapreplace(heap, fresh)
            continue
        if book.total + ladders[i].change(book, rung) > limit:
            below[i] = rung
        else:
            levels[i] = rung
            ladders[i].move(book, rung)
        if levels[i] + 1 < below[i]:
            heapq.heapreplace(heap, offer(i))
        else:
            heapq.heappop(heap)
