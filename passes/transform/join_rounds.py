"""``JoinRounds``: back to the whole program, with one plan for all rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...errors import OptionError
from ...ir.cost import CostModel
from ...ir.pipeline import Transform
from ...ir.plan import compose
from ...ir.program import Program


@dataclass(frozen=True)
class JoinRounds(Transform):
    """The program that the first ``start-round`` kept, with the plans of all rounds composed into one.

    Its graph, its weights, its groups and the scores of the first round are back: nothing of a round's weights stays.

    Errors   OptionError where no round was started
    Law      slicing by the joined plan leaves the shapes that slicing round by round left
    """

    needs: ClassVar[tuple[str, ...]] = ("plan",)
    gives: ClassVar[tuple[str, ...]] = ("axes", "groups", "scores", "plan")

    def run(self, program: Program) -> Program:
        whole = program.whole
        if whole is None:
            raise OptionError("there are no rounds to join", where=self.slug(), cure="put start-round before it")
        last, model = program.need("plan"), CostModel(whole)
        plan = compose(whole.need("plan"), last)
        about = {
            **last.about,
            "rounds": whole.need("plan").about["rounds"],
            "dense": vars(model()),
            "predicted": vars(model(plan.sizes(whole.need("groups")))),
        }
        return whole.but(plan=replace(plan, about=about))
