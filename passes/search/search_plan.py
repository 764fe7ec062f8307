"""``SearchPlan``: from scores and a budget to the plan that keeps the most importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

from ... import registry
from ...errors import InternalError, OptionError
from ...ir.cost import COUNTED, Budget, Cost, CostModel, Expression, Ledger
from ...ir.group import DEFAULT_KINDS, Kind, PruneGroup, Tie, lies_inside
from ...ir.importance import ImportanceScores
from ...ir.pipeline import Search
from ...ir.plan import HALVED, Choice, CompressionPlan, TokenPlan
from ...ir.program import Program
from ...target.latency_table import LatencyTable
from . import two_class as scan
from .finer import count_halvings, fill_finer, note_of_slack
from .floors import lower, note_of_floors, within_reach
from .infeasible import infeasible, nothing_to_prune
from .ladder import Ladder, Levels, ladder, sizes_at
from .latency_model import LatencyModel, TimedCost, model_for, out_of_reach

Method: TypeAlias = Callable[[Sequence[Ladder], Sequence[Expression], float], Levels]
"""A search: ladders, the terms of the cost, the bound on their sum -> one rung per ladder."""
HEADS = (Kind.HEAD, Kind.KV, Kind.QUERY)  # what ``head_scale`` weighs against the rest
HEAD_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # worth trying on calibration data


@dataclass(frozen=True)
class SearchPlan(Search):
    """Choose what stays of every prunable group of the wanted kinds, so that the result costs at most ``budget``.

    budget       the bound; a bound that the dense program already meets gives the empty plan. A share is of the
                 program with all its tokens, and between rounds of the whole program
    kinds        kinds of groups that may be cut; others keep their size
    method       ``two-class``: the exact scan (separable cost, at most two chunk costs, concave values);
                 ``dynamic``: the programme for values of any form (separable cost); ``lagrangian``: one threshold, for
                 every cost, on the concave envelope of the values; ``exhaustive``: tiny cases. ``auto`` is the first
                 that fits, where dynamic is left to values that are not concave and to budgets of latency; or a search
                 of a plugin (``Method``)
    head_scale   factor on what heads are worth when they compete with neurons and channels. Scores of unlike elements
                 are estimates with errors of their own, so that the best exchange rate between them is a matter of
                 trial (OPTIN weighs heads by 0.5, K-prune by 64). For comparable scores only: others rank elements
                 within their group, whose scale cancels
    table        of measured latency, for a budget of it: of the dense program, which is searched with the tokens that
                 the plan reduces already (the table says what these do)
    low          floors that nobody asked for are one step (see ``PruneGroup.least``); else only where the budget is out
                 of reach otherwise, and multiples that nobody asked for are halved where even that is not enough. A
                 note then says so
    reduced      for other budgets, where the plan reduces tokens already: the program with these tokens gone. Its
                 groups are searched, at what they cost there, and the plan's tokens are handed on

    Errors   NothingToPrune, BudgetInfeasible, OptionError (unknown or unfit method, head scale)
    Law      cost never exceeds the budget, and no aligned chunk would still fit; a tighter budget never costs more (as
             far as the method says so); the same scores give the same plan
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "reduced")
    needs: ClassVar[tuple[str, ...]] = ("axes", "groups", "scores")
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    budget: Budget
    kinds: tuple[Kind | str, ...] = DEFAULT_KINDS
    method: str = "auto"
    head_scale: float = 1.0
    table: LatencyTable | None = field(default=None, repr=False)
    low: bool = False
    reduced: Program | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method != "auto":
            registry.lookup("search", self.method)
        if not (math.isfinite(self.head_scale) and self.head_scale > 0):
            raise OptionError(
                "the head scale must be positive",
                where=f"--head-scale {self.head_scale:g}",
                why="it multiplies what heads are worth",
                cure="1 leaves the scores as they are",
            )

    def runs(self) -> tuple[object, ...]:
        return () if self.method == "auto" else (registry.lookup("search", self.method),)

    def run(self, program: Program) -> Program:
        tokens = None if program.plan is None else program.plan.tokens
        if tokens is None or tokens.empty or self.budget.metric == "latency":
            return self._search(program, program.whole or program, tokens)
        if self.reduced is None:
            raise InternalError("a plan that reduces tokens is searched on the reduced program")
        found = self._search(self.reduced.but(scores=program.scores), program, tokens)
        return program.but(plan=found.plan)

    def _search(self, program: Program, whole: Program, tokens: TokenPlan | None) -> Program:
        """``program`` with the plan; shares of the budget are of ``whole``, and ``tokens`` are handed on."""
        model, metric = model_for(program, self.budget, self.table, tokens), self.budget.metric
        terms, dense = model.terms[metric], model()
        if isinstance(model, LatencyModel):
            limit = self.budget.limit(model.dense())
        else:
            limit = self.budget.limit(dense if whole is program else CostModel(whole)())
        groups, scores = _live(program, kinds_named(self.kinds)), program.need("scores")
        if dense.metric(metric) <= limit:
            return program.but(plan=self._plan([], [], [], scores, dense, dense, "none needed").with_tokens(tokens))
        usual, groups = groups, self._reachable(program, whole, model, groups, limit)
        below = groups is not usual
        ladders = ladders_of(groups, scores, terms, self.head_scale)
        separable = model.separable(metric, [axis for one in ladders for axis in one.variables])
        method = self._method(ladders, terms, separable)
        search: Method = registry.lookup("search", method)
        levels = search(ladders, terms, limit)
        if len(levels) != len(ladders) or not all(0 <= n <= one.top for n, one in zip(levels, ladders, strict=True)):
            raise OptionError(
                f"the search '{method}' gave no rung per ladder",
                where=f"--search {method}",
                why=f"{len(levels)} rungs for {len(ladders)} ladders, or one that is not there",
            )
        said, notes = method, program.notes
        if method in registry.SEARCHES and not isinstance(model, LatencyModel):
            groups, ladders, levels, said, notes = self._fill(program, groups, levels, terms, limit, method)
        after = model(sizes_at(ladders, levels))
        if method not in registry.SEARCHES and after.metric(metric) > limit:
            raise OptionError(
                f"the search '{method}' exceeds the budget",
                where=f"--search {method}",
                why=f"{metric} {after.metric(metric)}, at most {limit:g}",
                cure="use `--search auto`",
            )
        if below:
            kept = [one.counts[level] for one, level in zip(ladders, levels, strict=True)]
            why = "lower floors" if self.low else f"{self.budget} is out of reach otherwise"
            notes = tuple(filter(None, (*notes, note_of_floors(usual, kept, groups, why))))
        hull = method == "lagrangian" and not all(one.concave for one in ladders)
        said = f"{said} on the concave envelope of the values" if hull else said
        plan = self._plan(groups, ladders, levels, scores, dense, after, said).with_tokens(tokens)
        if halved := count_halvings(usual, groups):
            plan = replace(plan, about={**plan.about, HALVED: halved})
        gone = [name for name, c in plan.elements.items() if not c.keep]
        notes = (*notes, f"layers that go: {', '.join(gone)}") if gone else notes
        return program.but(plan=plan, notes=tuple(dict.fromkeys(notes)))

    def _reachable(
        self, program: Program, whole: Program, model: CostModel, groups: list[PruneGroup], limit: float
    ) -> list[PruneGroup]:
        """The groups, lower as far as they are meant to be or must. Raises BudgetInfeasible where that does not do."""

        def cost(some: Sequence[PruneGroup]) -> Cost:
            return model({axis: n for g in some for axis, n in g.sizes(g.levels()[0]).items()})

        metric, timed = self.budget.metric, isinstance(model, LatencyModel)
        found = lower(groups) if self.low else groups
        if cost(found).metric(metric) > limit and not timed:
            found = within_reach(groups, lambda some: cost(some).metric(metric), limit)
        floor = cost(found)
        if floor.metric(metric) > limit:
            if isinstance(model, LatencyModel) and isinstance(floor, TimedCost):
                raise out_of_reach(program, self.budget, model, floor, groups)
            absolute = self.budget if whole is program else Budget(metric, limit, relative=False)
            raise infeasible(program, found, model, absolute, floor)
        return found

    def _fill(
        self,
        program: Program,
        groups: Sequence[PruneGroup],
        levels: Levels,
        terms: Sequence[Expression],
        limit: float,
        method: str,
    ) -> tuple[list[PruneGroup], list[Ladder], Levels, str, tuple[str, ...]]:
        """(groups, ladders, rungs, method, notes) with what was left of the budget filled by finer steps, where groups
        allow them; else with a note that says which multiples would use it."""
        scores = program.need("scores")

        def make(some: Sequence[PruneGroup]) -> list[Ladder]:
            return ladders_of(some, scores, terms, self.head_scale)

        found = fill_finer(groups, make, levels, terms, limit)
        note = note_of_slack(found, make, terms, limit)
        if found.levels != levels:
            method = f"{method}, then steps of {found.step}"
        notes = tuple(dict.fromkeys([*program.notes, *filter(None, [note])]))
        return found.groups, found.ladders, found.levels, method, notes

    def _method(self, ladders: Sequence[Ladder], terms: Sequence[Expression], separable: bool) -> str:
        """The search to use. Raises OptionError when the one that was asked for does not fit."""
        scannable = separable and scan.applies(ladders, terms)
        if self.method == "two-class" and not scannable:
            raise OptionError(
                "the two-class search does not fit this model",
                where="--search two-class",
                why="its groups have more than two costs per chunk, costs that multiply, or values that "
                "are not concave",
                cure="use `--search auto`",
            )
        if self.method == "dynamic" and not separable:
            raise OptionError(
                "the dynamic programme does not fit this model",
                where="--search dynamic",
                why=f"the {self.budget.metric} of its groups multiply: what one element costs depends on "
                "the size of other groups",
                cure="use `--search auto`",
            )
        if self.method != "auto":
            return self.method
        if scannable:
            return "two-class"
        # what an element costs in time depends on how many there are: no chunk has a price of its own
        bent = self.budget.metric == "latency" or not all(one.concave for one in ladders)
        return "dynamic" if separable and bent else "lagrangian"

    def _plan(
        self,
        groups: Sequence[PruneGroup],
        ladders: Sequence[Ladder],
        levels: Sequence[int],
        scores: Mapping[str, ImportanceScores],
        dense: Cost,
        after: Cost,
        method: str,
    ) -> CompressionPlan:
        """The plan names only what it cuts; ``about`` says how it was made."""
        choices = {
            name: choice
            for group, one, level in zip(groups, ladders, levels, strict=True)
            for name, choice in group.choose(one.counts[level], scores).items()
        }
        for name in lies_inside(groups, {n: c for n, c in choices.items() if isinstance(c, Choice)}):
            choices.pop(name, None)
        first = next(iter(scores.values()), None)
        about = {
            "criterion": first.criterion if first else None,
            "unit": first.unit if first else None,
            "seed": first.seed if first else None,
            "budget": str(self.budget),
            "method": method,
            "head_scale": self.head_scale,
            "kinds": [str(kind) for kind in kinds_named(self.kinds)],
            "counted": COUNTED,
            "dense": vars(dense),
            "predicted": vars(after),
            **({} if self.table is None else {"latency_table": self.table.hash}),
        }
        return CompressionPlan(choices, about)


def kinds_named(names: Sequence[Kind | str]) -> tuple[str, ...]:
    """``("head", Kind.FFN)`` -> kinds, those of plugins included. Raises OptionError with the nearest name."""
    for name in map(str, names):
        if name not in registry.KINDS:
            registry.kind(name)
    return tuple(map(str, names))


def ladders_of(
    groups: Sequence[PruneGroup],
    scores: Mapping[str, ImportanceScores],
    terms: Sequence[Expression],
    head_scale: float = 1.0,
) -> list[Ladder]:
    """One ladder per group; what a group is worth is the part of the dense cost that goes with it.

    Raises OptionError for a head scale where the scores of heads are not comparable.
    """
    book, ladders = Ledger(terms, {}), []
    for group in groups:
        given = scores[group.name]
        one = ladder(group, given, float(-book.changes(group.sizes(0))))
        if head_scale != 1.0 and group.kind in HEADS:
            if not given.comparable:
                raise OptionError(
                    "a head scale needs comparable scores",
                    where=f"--head-scale {head_scale:g}",
                    why=f"'{given.criterion}' only ranks elements within their group: a scale cancels",
                    cure="use `--importance fisher`, or leave the option away",
                )
            one = replace(one, values=tuple(head_scale * value for value in one.values))
        ladders.append(one)
    return ladders


def _live(program: Program, kinds: Sequence[str]) -> list[PruneGroup]:
    """Prunable groups of the wanted kinds, but for those that a tie decides. Raises NothingToPrune when there is
    none."""
    groups: Sequence[PruneGroup] = program.need("groups")
    tied = {g.name for tie in groups if isinstance(tie, Tie) for g in tie.tied}
    live = [g for g in groups if g.prunable and str(g.kind) in kinds and g.name not in tied]
    if str(Kind.LAYER) in kinds:  # other groups that may go entirely: all of it, or nothing
        rest = [g for g in groups if g.prunable and str(g.kind) not in kinds and g.sliced and g.floor == 0]
        live += [g.but(granularity=g.size, strict=True) for g in rest]
    if not live:
        raise nothing_to_prune(program, kinds)
    return live
