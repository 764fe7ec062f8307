"""A prune group as a search sees it: a ladder of counts, each worth something."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir.axis import Axis
from ...ir.cost import Expression, Ledger
from ...ir.group import Kind, PruneGroup
from ...ir.importance import ImportanceScores

Levels = list[int]  # one rung per ladder: what a search returns


@dataclass(frozen=True)
class Ladder:
    """One group's choice: keep the best ``counts[i]`` of its elements, which is worth ``values[i]``.

    order    [size] elements, most important first (ties by index): rung i keeps ``order[:counts[i]]``
    counts   ascending; the first is the floor, the last is the full size; steps are whole aligned chunks
    values   [len(counts)] non-decreasing; sums of scores are concave in the count, because better elements come
             first, while a criterion's own curve may have any form
    """

    group: str
    kind: Kind
    axis: Axis
    order: tuple[int, ...]
    counts: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def top(self) -> int:
        return len(self.counts) - 1

    @property
    def concave(self) -> bool:
        """True when no rung lies below the line between its neighbours: more elements, each worth less."""
        slopes = [self.slope(low, high) for low, high in itertools.pairwise(range(len(self.counts)))]
        # sums of equal scores differ by rounding, which is no bend
        slack = 1e-9 * max(slopes, default=0.0) + 1e-15 * max(map(abs, self.values))
        return all(late <= early + slack for early, late in itertools.pairwise(slopes))

    def envelope(self) -> list[int]:
        """Rungs on the upper concave envelope of the values, ascending, with both ends. All rungs when concave.

        The others are never the best choice at any price per element: two rungs mixed would be worth more.
        """
        if self.concave:
            return list(range(len(self.counts)))
        hull: list[int] = []
        for rung in range(len(self.counts)):
            while len(hull) > 1 and self.slope(hull[-2], hull[-1]) < self.slope(hull[-1], rung):
                hull.pop()
            hull.append(rung)
        return hull

    def slope(self, low: int, high: int) -> float:
        """Value per element between two rungs."""
        return (self.values[high] - self.values[low]) / (self.counts[high] - self.counts[low])

    def keep(self, level: int) -> tuple[int, ...]:
        """Indices that stay on this rung, ascending."""
        return tuple(sorted(self.order[: self.counts[level]]))


def ladder(group: PruneGroup, scores: ImportanceScores, worth: float) -> Ladder:
    """Cut a group's sorted scores into its aligned chunks and say what each count is worth.

    Comparable scores (losses in nats) are worth their sum:  ``V(k) = sum of the k best scores``,  or what the
    criterion's ``curve`` says of k elements. Where it gives an ``order``, the best are the first of that.

    Other scores (norms) only rank elements *within* their group, so they must not be added across groups, and dividing
    them by a cost would strip the expensive layers of a CNN first and then empty whichever layer has the flattest
    scores. They are worth the logarithm of the share that survives, times what the dense network spends on the group:

        ``V(k) = worth * ln(sum of the k best scores / sum of all scores)``      worth = cost that goes with the group

    Three properties follow, each tested. A group's unit cancels. In the dense network every group returns the same
    value per unit of cost, so flat scores give the same kept share everywhere, and only the *shape* of the scores moves
    it. The value falls without bound as a group empties, so no layer collapses while another is still full: summed over
    a chain of layers it is the logarithm of the share of signal that survives the whole chain. Where a branch may go
    entirely, its last rung is worth one ``worth`` (a factor e), more than any rung above it.
    """
    values = scores.values.detach().to("cpu", torch.float64)
    order = torch.argsort(values, descending=True, stable=True) if scores.order is None else scores.order.cpu()
    kept = torch.cat([values.new_zeros(1), values[order].cumsum(0)])
    counts = group.levels()  # from zero where the whole branch may go
    sums = [float(kept[count]) for count in counts]
    if scores.comparable and scores.curve is not None:
        curve = scores.curve.detach().to("cpu", torch.float64)
        worths = [float(curve[count]) for count in counts]
    elif scores.comparable:
        worths = sums
    elif sums[-1] <= 0.0:  # nothing but dead elements: worth nothing, the first to go
        worths = [0.0] * len(sums)
    else:
        # the best element is alive when any is, so the share is positive on every rung but the empty one; an order of
        # the criterion's own may put dead elements first: those rungs are worth as little as the empty one
        worths = [worth * math.log(s / sums[-1]) for s in sums if s > 0.0]
        worths = [worths[0] - worth] * (len(sums) - len(worths)) + worths
    return Ladder(group.name, group.kind, group.axis, tuple(order.tolist()), tuple(counts), tuple(worths))


def value_of(ladders: Sequence[Ladder], levels: Sequence[int]) -> float:
    """What a choice of rungs is worth: the objective of every search."""
    return math.fsum(one.values[level] for one, level in zip(ladders, levels, strict=True))


def ledger_at(terms: Sequence[Expression], ladders: Sequence[Ladder], levels: Sequence[int]) -> Ledger:
    """The cost ledger at a choice of rungs."""
    return Ledger(terms, {one.axis: one.counts[level] for one, level in zip(ladders, levels, strict=True)})


def step_costs(terms: Sequence[Expression], ladders: Sequence[Ladder]) -> list[list[int]]:
    """Cost of every rung above the floor, per ladder, with all other ladders full. Exact when costs are separable."""
    book = ledger_at(terms, ladders, [one.top for one in ladders])
    out = []
    for one in ladders:
        at = [book.change(one.axis, count) for count in one.counts]
        out.append([after - before for before, after in itertools.pairwise(at)])
    return out
