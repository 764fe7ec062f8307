"""One threshold on value per cost over every chunk of every group, with the true polynomial cost, then a fill."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from ...ir.cost import Expression, Ledger
from .fill import fill
from .ladder import Ladder, Levels, ledger_at


def lagrangian(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> Levels:
    """Keep a chunk iff its value per cost exceeds a multiplier mu, for the smallest mu that meets the limit; then fill.

        ``minimise  -sum V(k) + mu * C(k)``      C: the true cost, which may be a product of counts (CNN channels)

    mu is raised from zero and the chunk it reaches next is removed, until the cost fits. The cost of a chunk is asked
    of the *current* solution each time, so a product of two pruned axes (kept_in x kept_out) is re-linearised after
    every step. Then every chunk that still fits is put back, best value per cost first.

    Values that are not concave are replaced by their upper concave envelope on the way down: no mu ever chooses a rung
    below it, so a chunk is then a whole edge of the envelope. The fill may stop on the rungs between.

    Cost     n log n in the number of chunks: as some go, the others only get cheaper, so a stale heap entry is a bound
    Law      gap to the optimum of separable costs is at most one chunk's value; nothing more fits at the end;
             a tighter limit never costs more (the path of removals does not depend on the limit, nor does the
             order of the fill until the first chunk that fits one limit and not the other)

    Chunks that cost nothing stay. The floors' own cost must fit within ``limit``.
    """
    levels = [one.top for one in ladders]
    book = ledger_at(terms, ladders, levels)
    rungs = [one.envelope()[:-1] for one in ladders]  # what is below the current rung, the next one last
    heap = [_entry(i, ladders[i], levels[i], rungs[i][-1], book) for i in range(len(ladders)) if rungs[i]]
    heapq.heapify(heap)
    while book.total > limit and heap:
        _, _, i = heap[0]
        fresh = _entry(i, ladders[i], levels[i], rungs[i][-1], book)
        if fresh > heap[0]:  # its saving shrank since it was asked: back into the queue
            heapq.heapreplace(heap, fresh)
            continue
        if fresh[0] == math.inf:
            break  # nothing that is left would save anything
        levels[i] = rungs[i].pop()
        ladders[i].move(book, levels[i])
        if rungs[i]:
            heapq.heapreplace(heap, _entry(i, ladders[i], levels[i], rungs[i][-1], book))
        else:
            heapq.heappop(heap)
    fill(ladders, levels, book, limit)
    return levels


def _entry(i: int, one: Ladder, level: int, lower: int, book: Ledger) -> tuple[float, float, int]:
    """(value per cost of the topmost chunk, minus its group's kept share, group): the smallest is removed first.

    Equal values per cost are taken from the fullest group, then from the first in order.
    """
    saving = -one.change(book, lower)
    value = one.values[level] - one.values[lower]
    return value / saving if saving > 0 else math.inf, -one.counts[level] / one.counts[-1], i
