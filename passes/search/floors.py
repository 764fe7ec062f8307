"""Floors and multiples that nobody asked for, where a budget lies below what they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...ir.group import PruneGroup


def lower(groups: Sequence[PruneGroup]) -> list[PruneGroup]:
    """The groups with a floor of one step where the floor is nobody's wish; others as they are.

    >>> from fxprune.ir.axis import Axis
    >>> one = PruneGroup("a", "ffn", 160, Axis(160), granularity=8, floor=16, least=8)
    >>> [g.floor for g in lower([one, one.but(least=None)])]
    [8, 16]
    """
    return [g.lowest() for g in groups]


def lower_floors(groups: Sequence[PruneGroup]) -> Iterator[list[PruneGroup]]:
    """The groups with ever lower floors: one step, then one step of half the multiple, down to single elements, as far
    as nobody asked for the floor or the multiple."""
    now = lower(groups)
    yield now
    while any(not g.strict and g.granularity > 1 for g in now):
        now = [g if g.least is None else g.but(floor=min(g.floor, g.granularity)) for g in (g.finer() for g in now)]
        yield now


def within_reach(
    groups: Sequence[PruneGroup], least: Callable[[Sequence[PruneGroup]], float], limit: float
) -> list[PruneGroup]:
    """The first of :func:`lower_floors` whose least cost is within ``limit``; the last where none is."""
    found = list(groups)
    for found in lower_floors(groups):
        if least(found) <= limit:
            break
    return found


def note_of_floors(groups: Sequence[PruneGroup], kept: Sequence[int], low: Sequence[PruneGroup], why: str) -> str:
    """What going below the floors came to.

    groups   with the floors that they had;  kept  how many stay of each;  low  the same groups as they were searched
    """
    below = [(g, n) for g, n in zip(groups, kept, strict=True) if n < g.floor]
    steps = min((g.granularity for g in low if g.least is not None), default=1)
    if not below:
        return ""
    group, count = min(below, key=lambda one: one[1] / one[0].size)
    said = f"{why}: {len(below)} of {len(groups)} groups go below the usual floor, in steps of {steps}"
    return f"{said}; the least that stays is {count} of {group.size} of {group.name}"
