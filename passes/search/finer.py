"""Steps finer than the groups' multiples, where whole ones leave much of the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import spell
from ...ir.cost import Expression
from ...ir.group import PruneGroup
from .fill import fill
from .ladder import Ladder, Levels, ledger_at

SLACK = 0.02
"""A share of the budget that may be left: less is not worth odd counts."""

MakeLadders = Callable[[Sequence[PruneGroup]], list[Ladder]]


@dataclass(frozen=True)
class Filled:
    """Rungs of the groups' ladders, and the share of the budget that they leave."""

    groups: list[PruneGroup]
    ladders: list[Ladder]
    levels: Levels
    left: float

    @property
    def step(self) -> int:
        """The finest step that was taken anywhere."""
        return min(g.granularity for g in self.groups)


def fill_finer(
    groups: Sequence[PruneGroup], make: MakeLadders, levels: Levels, terms: Sequence[Expression], limit: float
) -> Filled:
    """Halve the steps of groups that are not strict and climb, until at most ``SLACK`` is left or steps are single.

    make     the ladders of groups;  levels: rungs of ``make(groups)`` to start from
    Law      the result costs at most ``limit``, and keeps at least what ``levels`` keep
    """
    now, ladders, levels = list(groups), make(groups), list(levels)
    while True:
        left = 1 - ledger_at(terms, ladders, levels).total / limit
        if left <= SLACK or all(g.strict or g.granularity == 1 for g in now):
            return Filled(now, ladders, levels, left)
        now = [g.finer() for g in now]
        finer = make(now)
        levels = [new.counts.index(old.counts[at]) for new, old, at in zip(finer, ladders, levels, strict=True)]
        ladders = finer
        fill(ladders, levels, ledger_at(terms, ladders, levels), limit)


def note_of_slack(found: Filled, make: MakeLadders, terms: Sequence[Expression], limit: float) -> str:
    """What multiples that were asked for leave of the budget, and which would use it; "" where none would."""
    strict = sorted({g.granularity for g in found.groups if g.strict and g.granularity > 1})
    if found.left <= SLACK or not strict:
        return ""
    free = [g.but(strict=False) for g in found.groups]
    best = fill_finer(free, make, found.levels, terms, limit)
    if found.left - best.left <= SLACK:
        return ""
    asked, rest = " and ".join(map(str, strict)), max(best.left, 0.0)
    left = f"{found.left:.0%} of the budget is left, because counts are multiples of {asked}"
    return spell(f"{left}: `--align {best.step}` would leave {rest:.0%}")


def count_halvings(usual: Sequence[PruneGroup], taken: Sequence[PruneGroup]) -> int:
    """How often the steps of ``usual`` were halved to give those of ``taken``.

    >>> from fxprune.ir.axis import Axis
    >>> one = PruneGroup("a", "ffn", 160, Axis(160), granularity=8, strict=False)
    >>> count_halvings([one, one.but(strict=True)], [one.finer(2), one.but(strict=True)])
    2
    """
    times = 0
    while any(old.finer(times).granularity > new.granularity for old, new in zip(usual, taken, strict=True)):
        times += 1
    return times
