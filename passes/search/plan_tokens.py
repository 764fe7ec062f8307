"""``PlanTokens``: so many tokens go behind every attention, as decided before or stated by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ... import registry
from ...errors import OptionError
from ...ir.cost import Budget
from ...ir.pipeline import Search
from ...ir.plan import CompressionPlan, TokenPlan
from ...ir.program import Program
from ...ir.token_flow import TokenFlow


@dataclass(frozen=True)
class PlanTokens(Search):
    """Plan the reduction of tokens to the letter: nothing is scored or tried. What the plan says of groups stays, and
    a search behind it spends what is left of its budget on the graph with fewer tokens.

    reducer   as in ``--tokens``, without what decides: ``tome``, ``ppt{threshold=2}``
    counts    tokens that go behind each attention where they may become fewer (``fxprune inspect`` lists them), in
              graph order
    budget    what they were decided under where nothing else was cut, for the report: nothing is reckoned with it here

    Needs ``tokens``. Errors: OptionError for an unknown reducer, too few or too many counts, or more tokens than can
    go at once.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget",)
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    reducer: str = "tome"
    counts: tuple[int, ...] = ()
    budget: Budget | None = None

    def __post_init__(self) -> None:
        self._make_reducer()
        if any(count < 0 for count in self.counts):
            raise OptionError("a count of tokens cannot be negative", where=str(self))

    def run(self, program: Program) -> Program:
        flow: TokenFlow = program.need("tokens")
        if len(self.counts) != len(flow.usable):
            raise OptionError(
                f"'{self.slug()}' needs one count per attention",
                where=str(self),
                why=f"{len(self.counts)} counts, {len(flow.usable)} attentions where tokens can be reduced",
                cure="`fxprune inspect MODEL` lists them; 0 takes none away",
            )
        made, left = self._make_reducer(), flow.usable[0].tokens if flow.usable else 0
        for site, count in zip(flow.usable, self.counts, strict=True):
            most = made.cap(left, site.protected)
            if count > most:
                raise OptionError(
                    f"'{self.slug()}' removes more tokens than can go at once",
                    where=str(self),
                    why=f"{count} of {left} at {site.name}, '{made.name}' takes at most {most} there",
                )
            left -= count
        removed = {s.name: count for s, count in zip(flow.usable, self.counts, strict=True) if count}
        plan = program.plan or CompressionPlan({}, {"method": f"tokens by {self}"})
        return program.but(plan=plan.with_tokens(TokenPlan(self.reducer, removed, flow.unmerge)))

    def _make_reducer(self) -> Any:
        """The reducer itself. Raises OptionError."""
        return registry.reducer(self.reducer, self.slug())
