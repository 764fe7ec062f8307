"""``StartRound``: remember the whole program before a part of its plan is carried out for another round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir.pipeline import Analysis
from ...ir.plan import compose
from ...ir.program import Program


@dataclass(frozen=True)
class StartRound(Analysis):
    """Keep the program as it is, its plan composed with those of earlier rounds, as ``Program.whole``.

    What follows up to the next ``start-round`` or ``join-rounds`` works on what the plan leaves: recover and slice it,
    find its groups (``find-groups{inherit=true}``: under the limits of the whole), score and search again. Shares in
    budgets stay shares of the whole.

    Needs ``axes``, ``groups`` and ``plan``; all facts stay.
    """

    needs: ClassVar[tuple[str, ...]] = ("axes", "groups", "plan")

    def run(self, program: Program) -> Program:
        plan, earlier = program.need("plan"), program.whole
        if earlier is None:
            return program.but(whole=program.but(plan=replace(plan, about={**plan.about, "rounds": 2})))
        rounds = earlier.need("plan").about["rounds"] + 1
        both = compose(earlier.need("plan"), plan)
        return program.but(whole=earlier.but(plan=replace(both, about={**both.about, "rounds": rounds})))
