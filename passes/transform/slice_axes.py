"""``SliceAxes``: make the plan true in the weights and the graph."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.pipeline import Transform
from ...ir.program import Program
from .resize import resize


@dataclass(frozen=True)
class SliceAxes(Transform):
    """Physically remove what the plan does not keep. Deterministic; needs no data.

    Needs ``axes``, ``groups`` and ``plan``; gives the smaller program with its facts dropped.
    """

    needs = ("axes", "groups", "plan")

    def run(self, program: Program) -> Program:
        plan = program.need("plan")
        plan.check(program.group_by_name)
        keep = plan.keep(program.need("groups"))
        if not keep:
            return program
        return program.without_facts(exported=resize(program, keep, self.slug()))
