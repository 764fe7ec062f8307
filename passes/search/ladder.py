"""A prune group as a search sees it: a ladder of counts, each worth something."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
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
    sizes    [len(counts)] what each rung does to the variables of the cost, where that is more than ``axis`` at its
             count (a tie of several groups)
    """

    group: str
    kind: Kind | str
    axis: Axis
    order: tuple[int, ...]
    counts: tuple[int, ...]
    values: tuple[float, ...]
    sizes: tuple[Mapping[Axis, int], ...] = ()

    def at(self, level: int) -> Mapping[Axis, int]:
        """What a rung does to the variables of the cost."""
        return self.sizes[level] if self.sizes else {self.axis: self.counts[level]}

    @property
    def variables(self) -> tuple[Axis, ...]:
        """The variables of the cost that it decides."""
        return tuple(self.at(self.top))

    def change(self, book: Ledger, level: int) -> int:
        """What it would cost to go to a rung."""
        return book.changes(self.sizes[level]) if self.sizes else book.change(self.axis, self.counts[level])

    def move(self, book: Ledger, level: int) -> None:
        """Go to a rung."""
        for axis, count in self.at(level).items():
            book.set(axis, count)

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
    criterion's ``curve`` says of k elements. Where it gives an ``order``, the best are the first of that. Nothing at
    all is worth ``V(size)`` less what losing the whole of it costs, where that was measured (``whole``).

    Other scores (norms) only rank elements *within* their group, so they must not be added across groups, and dividing
    them by a cost would strip the expensive layers of a CNN first and then empty whichever layer has the flattest
    scores. They are worth the logarithm of the share that survives, times what the dense network spends on the group:

        ``V(k) = worth * ln(sum of the k best scores / sum of all scores)``      worth = cost that goes with the group

    or, where they come with a ``curve``, ``worth`` times that.

    Three properties follow, each tested. A group's unit cancels. In the dense network every group returns the same
    value per unit of cost, so flat scores give the same kept share everywhere, and only the *shape* of the scores moves
    it. The value falls without bound as a group empties, so no layer collapses while another is still full: summed over
    a chain of layers it is the logarithm of the share of signal that survives the whole chain. Where a branch may go
    entirely, its last rung is worth one ``worth`` (a factor e), more than any rung above it.
    """
    values = scores.values.detach().to("cpu", torch.float64)
    order = torch.tensor(scores.ranking(), dtype=torch.long)
    kept = torch.cat([values.new_zeros(1), values[order].cumsum(0)])
    counts = group.levels()  # from zero where the whole branch may go
    sums = [float(kept[count]) for count in counts]
    if scores.curve is not None:
        curve = scores.curve.detach().to("cpu", torch.float64) * (1.0 if scores.comparable else worth)
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
    if scores.whole is not None and counts[0] == 0:
        worths[0] = min(worths[-1] - scores.whole, worths[min(1, len(worths) - 1)])
    sizes = [group.sizes(count) for count in counts]
    more = () if all(list(s) == [group.axis] for s in sizes) else tuple(sizes)
    return Ladder(group.name, group.kind, group.axis, tuple(order.tolist()), tuple(counts), tuple(worths), more)


def value_of(ladders: Sequence[Ladder], levels: Sequence[int]) -> float:
    """What a choice of rungs is worth: the objective of every search."""
    return math.fsum(one.values[level] for one, level in zip(ladders, levels, strict=True))


def ledger_at(terms: Sequence[Expression], ladders: Sequence[Ladder], levels: Sequence[int]) -> Ledger:
    """The cost ledger at a choice of rungs."""
    return Ledger(terms, sizes_at(ladders, levels))


def sizes_at(ladders: Sequence[Ladder], levels: Sequence[int]) -> dict[Axis, int]:
    """The variables of the cost at a choice of rungs."""
    return {axis: n for one, level in zip(ladders, levels, strict=True) for axis, n in one.at(level).items()}


def step_costs(terms: Sequence[Expression], ladders: Sequence[Ladder]) -> list[list[int]]:
    """Cost of every rung above the floor, per ladder, with all other ladders full. Exact when costs are separable."""
    book = ledger_at(terms, ladders, [one.top for one in ladders])
    out = []
    for one in ladders:
        at = [one.change(book, level) for level in range(len(one.counts))]
        out.append([after - before for before, after in itertools.pairwise(at)])
    return out
