"""``ReadPlan``: take a plan that is there already, from a plan.json beside the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ... import registry
from ...errors import InternalError, OptionError, PlanError
from ...ir.pipeline import Search
from ...ir.plan import CompressionPlan
from ...ir.program import Program
from ...ir.token_flow import counts_behind


@dataclass(frozen=True)
class ReadPlan(Search):
    """The plan is the one that is given: nothing is scored, nothing searched. This is how a report states that somebody
    gave a plan (``fxprune apply``, ``fxprune export``): kept elements are too many for a line of text, so the text says
    which plan it was, and the artefact holds it.

    digest   :attr:`CompressionPlan.digest` of the plan that is meant, so that another one is an error; "": any
    plan     what ``--plan`` names

    Needs ``groups``, and ``tokens`` where the plan reduces any.
    Errors   PlanError at the line where the plan does not fit the program, or is another than ``digest`` says;
             OptionError where the places for its tokens were not looked for as it needs them
    """

    needs: ClassVar[tuple[str, ...]] = ("groups",)
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    digest: str = ""
    plan: CompressionPlan | None = field(default=None, repr=False, compare=False)

    def run(self, program: Program) -> Program:
        plan = self.plan
        if plan is None:
            raise InternalError(f"'{self.slug()}' was given no plan")
        plan.check(program.group_by_name)  # first: what is wrong with a group or a site has a line
        self._check_tokens(program, plan)
        if self.digest not in ("", plan.digest, *plan.aliases):
            raise PlanError(
                "this is another plan than the pipeline's",
                where=plan.source.name if plan.source else "plan",
                why=f"it keeps other elements, tokens or tiles: its digest is {plan.digest}, the "
                f"pipeline says {self.digest}",
                cure=f"give the plan.json that lies beside the report, or write {self.slug()} without "
                "digest to take this one",
            )
        return program.but(plan=plan)

    def _check_tokens(self, program: Program, plan: CompressionPlan) -> None:
        if plan.tokens is None or plan.tokens.empty:
            return
        wanted = "find-token-sites" + "{unmerge=true}" * plan.tokens.unmerge
        if program.tokens is None:
            raise OptionError(
                "the plan reduces tokens, and no pass looked for where they may become fewer",
                where=str(self),
                cure=f"put {wanted} before it",
            )
        if program.tokens.unmerge != plan.tokens.unmerge:
            raise OptionError(
                "the plan and find-token-sites differ about restoring tokens",
                where=str(self),
                why=f"the plan says unmerge {str(plan.tokens.unmerge).lower()}",
                cure=f"put {wanted} before it",
            )
        counts_behind(program.tokens, plan.tokens, registry.reducer(plan.tokens.reducer, "the plan's tokens"))
