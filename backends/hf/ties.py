"""Groups that one number of a config speaks for keep the same count in every layer: tied; the rest is frozen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ...ir.axis import kept_total
from ...ir.group import PruneGroup, Tie
from .config_numbers import KnownClass, Number, Path, Place, Shapes, numbers_of

MOST_TOGETHER = 3  # numbers that move as one: heads, KV heads and the width of both
MOST_CHECKED = 64  # levels of a tie that are built one by one


@dataclass(frozen=True, kw_only=True)
class ClassTie(Tie):
    """Groups that share a count, of which the class takes some.

    counts    that it takes, ascending; the last one is the whole
    numbers   of the config that say the count: each is what it was times the share that stays
    """

    counts: tuple[int, ...]
    numbers: tuple[Number, ...]

    def levels(self) -> list[int]:
        return list(self.counts)

    def over(self, groups: Sequence[PruneGroup]) -> ClassTie:
        tie = Tie.of(self.name, groups)
        said = {f.name: getattr(tie, f.name) for f in dataclasses.fields(tie)}
        counts = (*(k for k in self.counts if k < tie.size), tie.size)
        return ClassTie(**said, counts=counts, numbers=self.numbers)

    def config_at(self, count: int) -> dict[Path, int]:
        """The config's numbers where so many stay."""
        return {n.path: n.value * count // self.size for n in self.numbers}


def tie_groups(
    groups: Sequence[PruneGroup], known: KnownClass, refuse: Callable[[ClassTie], str]
) -> tuple[list[ClassTie], dict[str, str]]:
    """(ties of the groups that the config can say, why each of the others cannot be).

    refuse   says why the class does not compute what the graph does when a tie is cut, "" where it does: several sets
             of numbers may give the same shapes (fewer heads, or narrower ones)
    """
    live = [g for g in groups if g.prunable]
    whole = known.shapes({}) or {}
    numbers = numbers_of(known, sorted({g.size for g in live}))
    ties, refused, left = [], dict[str, str](), {g.name: g for g in live}
    while left:
        first = next(iter(left.values()))
        why = f"no number of {type(known.config).__name__} says how many there are (hf{{layout=free}} needs none)"
        found = [first.name]
        for tie in _sets_of_numbers(first, numbers, left.values(), known, whole):
            said = refuse(tie)
            if not said:
                ties.append(tie)
                found, why = [*tie.members], ""
                break
            why = f"with {tie.name} in proportion, {said}"
        for name in found:
            del left[name]
            refused |= {name: why} if why else {}
    return ties, refused


def _sets_of_numbers(
    first: PruneGroup, numbers: Sequence[Number], groups: Iterable[PruneGroup], known: KnownClass, whole: Shapes
) -> Iterator[ClassTie]:
    """Ties that hold ``first``, of the fewest numbers: what these move is what the members reach, and nothing else."""
    touching = [n for n in numbers if n.moves & _places(first, whole)]
    for count in range(1, min(MOST_TOGETHER, len(touching)) + 1):
        for chosen in itertools.combinations(touching, count):
            moved = frozenset[Place]().union(*(n.moves for n in chosen))
            members = [g for g in groups if g.size == first.size and _places(g, whole) <= moved]
            reached = frozenset[Place]().union(*(_places(g, whole) for g in members))
            if first in members and moved == reached:
                tie = Tie.of("+".join(".".join(n.path) for n in chosen), members)
                counts = _counts(tie, chosen, known, whole)
                if len(counts) > 1:
                    said = {f.name: getattr(tie, f.name) for f in dataclasses.fields(tie)}
                    yield ClassTie(**said, counts=counts, numbers=chosen)


def _counts(tie: Tie, numbers: Sequence[Number], known: KnownClass, whole: Shapes) -> tuple[int, ...]:
    """Kept counts that the class builds, with the very shapes that slicing leaves; of many, a few are tried."""
    levels = [k for k in tie.levels() if k and all((n.value * Fraction(k, tie.size)).denominator == 1 for n in numbers)]
    some = levels if len(levels) <= MOST_CHECKED else [levels[0], levels[len(levels) // 2]]
    refused = {
        k
        for k in some
        if k != tie.size
        and known.shapes({n.path: n.value * k // tie.size for n in numbers}) != _slice_shapes(tie, k, whole)
    }
    return () if refused and some is not levels else tuple(k for k in levels if k not in refused)


def _slice_shapes(tie: Tie, count: int, whole: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes where every group of the tie keeps so many."""
    found = dict(whole)
    for group in tie.tied:
        for slot in group.slots:
            if slot.parameter in found:
                shape = list(found[slot.parameter])
                shape[slot.position] = kept_total(slot.dim, {group.axis: count})
                found[slot.parameter] = tuple(shape)
    return found


def _places(group: PruneGroup, whole: Shapes) -> frozenset[Place]:
    """Dimensions of the class's weights that a group reaches."""
    return frozenset((s.parameter, s.position) for s in group.slots if s.parameter in whole)
