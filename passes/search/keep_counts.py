"""``KeepCounts``: so many elements of every group stay, as decided before or stated by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import OptionError, nearest
from ...ir.cost import COUNTED, Budget, CostModel
from ...ir.pipeline import Search
from ...ir.plan import Choice, CompressionPlan
from ...ir.program import Program
from .ladder import ladder


@dataclass(frozen=True)
class KeepCounts(Search):
    """Keep the best-scored elements, as many as ``counts`` says; nothing is searched.

    This is how a report states a search that went by measured time: a table of timings is no part of a pipeline.

    counts   ``GROUP=N``, e.g. ``blocks.0.mlp.fc1:ffn=96``; groups that are not named stay whole
    budget   what they were decided under, for the report: nothing is reckoned with it here

    Errors   OptionError for an unknown, frozen or repeated group, and for a count below its floor, above its size or
             off its multiples
    """

    takes: ClassVar[tuple[str, ...]] = ("budget",)
    needs: ClassVar[tuple[str, ...]] = ("groups", "scores")
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    counts: tuple[str, ...] = ()
    budget: Budget | None = None

    def __post_init__(self) -> None:
        names = [self._read(one)[0] for one in self.counts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise OptionError(f"'{self.slug()}' names a group twice", where=twice)

    def run(self, program: Program) -> Program:
        groups, scores, choices = program.group_by_name, program.need("scores"), {}
        for name, count in map(self._read, self.counts):
            if name not in groups:
                raise OptionError(
                    f"'{self.slug()}' names a group that this model does not have",
                    where=name,
                    cure=nearest(name, groups),
                )
            group = groups[name]
            if not group.prunable or name not in scores:
                raise OptionError(
                    f"'{self.slug()}' cuts a group that cannot be cut",
                    where=name,
                    why=group.frozen or "it has no scores",
                )
            rungs = group.levels()
            if count not in rungs:
                raise OptionError(
                    f"'{self.slug()}' states a count that the group cannot have",
                    where=f"{name}={count}",
                    why=f"it has {group.size} elements; {rungs[0]} to {rungs[-1]} may stay, in multiples "
                    f"of {group.granularity}",
                    cure="change the count, or find-groups{align=..,floor=..}",
                )
            if count < group.size:
                one = ladder(group, scores[name], 0.0)
                choices[name] = Choice(str(group.kind), group.size, one.keep(one.counts.index(count)), group.basis)
        plan = program.plan or CompressionPlan()
        return program.but(plan=plan.with_elements(choices, self._about(program, choices)))

    def _read(self, text: str) -> tuple[str, int]:
        name, equals, count = text.rpartition("=")
        if not equals or not name or not count.isascii() or not count.isdigit():
            raise OptionError(f"'{text}' is not a count", where=self.slug(), cure="write GROUP=N")
        return name, int(count)

    def _about(self, program: Program, choices: dict[str, Choice]) -> dict[str, object]:
        first = next(iter(program.need("scores").values()), None)
        model = CostModel(program)
        kept = {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}
        return {
            "criterion": first.criterion if first else None,
            "unit": first.unit if first else None,
            "seed": first.seed if first else None,
            "budget": None if self.budget is None else str(self.budget),
            "method": "stated counts",
            "counted": COUNTED,
            "dense": vars(model()),
            "predicted": vars(model(kept)),
        }


def counts_of(plan: CompressionPlan) -> tuple[str, ...]:
    """A plan's counts, as ``KeepCounts`` reads them.

    >>> counts_of(CompressionPlan({"b:ffn": Choice("ffn", 4, (1, 2, 3))}))
    ('b:ffn=3',)
    """
    return tuple(f"{name}={len(choice.keep)}" for name, choice in plan.elements.items())
