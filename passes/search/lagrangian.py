"""One threshold on value per cost over every chunk of every group, with the true polynomial cost, then a fill."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from ...cost import Expression, Ledger
from .ladder import Ladder, Levels, ledger_at


def lagrangian(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> Levels:
    """Keep a chunk iff its value per cost exceeds a multiplier mu, for the smallest mu that meets the limit; then fill.

        ``minimise  -sum V(k) + mu * C(k)``      C: the true cost, which may be a product of counts (CNN channels)

    mu is raised from zero and the chunk it reaches next is removed, until the cost fits. The cost of a chunk is asked
    of the *current* solution each time, so a product of two pruned axes (kept_in x kept_out) is re-linearised after
    every step. Then every chunk that still fits is put back, best value per cost first.

    Cost     n log n in the number of chunks: as some go, the others only get cheaper, so a stale heap entry is a bound
    Law      gap to the optimum of separable costs is at most one chunk's value; nothing more fits at the end;
             a tighter limit never costs more (the path of removals does not depend on the limit, nor does the
             order of the fill until the first chunk that fits one limit and not the other)

    Chunks that cost nothing stay. The floors' own cost must fit within ``limit``.
    """
    levels = [one.top for one in ladders]
    book = ledger_at(terms, ladders, levels)
    heap = [_entry(i, ladders[i], levels[i], book) for i in range(len(ladders)) if levels[i]]
    heapq.heapify(heap)
    while book.total > limit and heap:
        _, _, i = heap[0]
        fresh = _entry(i, ladders[i], levels[i], book)
        if fresh > heap[0]:  # its saving shrank since it was asked: back into the queue
            heapq.heapreplace(heap, fresh)
            continue
        if fresh[0] == math.inf:
            break  # nothing that is left would save anything
        levels[i] -= 1
        book.set(ladders[i].axis, ladders[i].counts[levels[i]])
        if levels[i]:
            heapq.heapreplace(heap, _entry(i, ladders[i], levels[i], book))
        else:
            heapq.heappop(heap)
    _fill(ladders, levels, book, limit)
    return levels


def _entry(i: int, one: Ladder, level: int, book: Ledger) -> tuple[float, float, int]:
    """(value per cost of the topmost chunk, minus its group's kept share, group): the smallest is removed first.

    Equal values per cost are taken from the fullest group, then from the first in order.
    """
    saving = -book.change(one.axis, one.counts[level - 1])
    value = one.values[level] - one.values[level - 1]
    return value / saving if saving > 0 else math.inf, -one.counts[level] / one.counts[-1], i


def _fill(ladders: Sequence[Ladder], levels: Levels, book: Ledger, limit: float) -> None:
    """Add chunks, best value per cost first, until none fits. What does not fit now never will: costs only grow."""

    def entry(i: int) -> tuple[float, float, int]:
        one, level = ladders[i], levels[i]
        cost = book.change(one.axis, one.counts[level + 1])
        value = one.values[level + 1] - one.values[level]
        return -(value / cost) if cost > 0 else -math.inf, one.counts[level] / one.counts[-1], i

    heap = [entry(i) for i, one in enumerate(ladders) if levels[i] < one.top]
    heapq.heapify(heap)
    while heap:
        i = heap[0][2]
        fresh = entry(i)
        if fresh > heap[0]:
            heapq.heapreplace(heap, fresh)
            continue
        one = ladders[i]
        if book.total + book.change(one.axis, one.counts[levels[i] + 1]) > limit:
            heapq.heappop(heap)
            continue
        levels[i] += 1
        book.set(one.axis, one.counts[levels[i]])
        if levels[i] < one.top:
            heapq.heapreplace(heap, entry(i))
        else:
            heapq.heappop(heap)
