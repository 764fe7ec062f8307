"""With data nobody has to choose: plans that other kinds or another criterion make are held against the plain one, each
repaired, on samples that repaired neither, and the nearest to the dense model is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from ..errors import BudgetInfeasible, FxpruneError, MissingDevice, NothingToPrune
from ..ir.program import Program
from ..ir.provenance import first_line
from ..process import ranks
from ..request.goal import Goal
from .decide import Decided, decide_on, prepare, score_as_able
from .members import compare_repaired, in_doubt
from .run import Run

ENOUGH = 64  # samples; with fewer a difference of the outputs is chance
COMPARED = 384  # samples: half of them repair, the others judge
RIVAL = "obs{judged=48,levels=6}"
"""Damage measured behind repair: ahead of trajectory on plain residual networks (64.0 against 45.3 % on CIFAR-10 at 0.2
of the MACs, 0.1 to 1.3 points from 0.9 to 0.3), far behind on EfficientNet-Lite0, where depthwise convolutions lie
between a channel and what could make up for it."""


Outcome = TypeVar("Outcome")
Known: TypeAlias = dict[tuple[tuple[str, ...], str], tuple[Run, Goal]]
"""(kinds, criterion) -> the run that is scored by it, and the goal that the scores are for."""


@dataclass(frozen=True)
class Alternative:
    """Another goal that may serve better, and what it is called: what it does, and what the plain one does."""

    goal: Goal
    taken: str
    left: str


def decide_among(run: Run, goal: Goal, known: Known | None = None) -> Decided:
    """:func:`decide` for the goal, and for its alternatives where data can judge. An alternative is taken where its
    outputs lie nearer to the dense ones by more than one standard error than those of the best so far, or where that
    cannot reach the budget. Nobody asked for them: one that fails is told in a note and left.

    known   runs that are scored already, of other budgets of the same goal; filled
    """
    plain = replace(goal, wider=(), rival=False)
    begun = _prepare(run, plain, known)
    assert begun is not None
    ready, plain = begun
    if run.data is None or run.data.generated or run.data.samples < ENOUGH:
        return decide_on(ready, plain)
    best, failed = _try(ready, plain)
    run = run if best is None else replace(run, data=best.run.data)  # in batches that memory holds
    wider = goal.wider if run.request.backend.any_graph else ()  # a class cannot say what turns and takes apart
    for other in _alternatives(replace(goal, wider=wider), ready.program):
        try:
            again = _prepare(run, other.goal, known, plain)
            found, why = (None, None) if again is None else _try(*again)
            if found is None or (best is not None and _alike(found, best)):
                failed = failed if why is None else why
            elif best is None:
                best = _add_note(found, f"{other.taken}: without that the budget is out of reach")
            else:
                best = _nearer(best, found, other)
        except ranks.LostRank:
            raise
        except Exception as error:  # whatever it is, the plain plan stands
            run.tell.note(f"{other.left}: {_describe_failure(error)}")
    if best is None:
        assert failed is not None
        raise failed
    return best


def carry_through(decided: Decided, finish: Callable[[Decided], Outcome]) -> Outcome:
    """What ``finish`` makes of a decision. Where that fails for an alternative that was taken in place of another plan,
    what it makes of the other one, with a note."""
    if decided.instead_of is None or ranks.world() > 1:  # one rank alone writes: the others would not follow
        return finish(decided)
    try:
        return finish(decided)
    except MissingDevice:  # it is no fault of the plan
        raise
    except Exception as error:
        decided.run.tell.note(
            f"the plan that is nearer to dense cannot be delivered, another is taken: {_describe_failure(error)}"
        )
        return carry_through(decided.instead_of, finish)


def _describe_failure(error: Exception) -> str:
    """What went wrong in something that nobody asked for, in one line."""
    if isinstance(error, FxpruneError):
        return f"trying failed: {error.what}" + (f" ({error.why})" if error.why else "")
    return f"trying failed, which is a fault of fxprune's own to be reported: {first_line(error)}"


def _alternatives(goal: Goal, ready: Program) -> Iterator[Alternative]:
    """What may be tried beside the plain goal, whose prepared program is ``ready``."""
    plain = replace(goal, wider=(), rival=False)
    if goal.wider:
        named = ", ".join(map(str, goal.wider))
        wide = replace(plain, kinds=(*goal.kinds, *goal.wider))
        yield Alternative(wide, f"{named} may go as well", f"{named} stay whole")
    if goal.rival and in_doubt(ready):
        yield Alternative(replace(plain, criterion=RIVAL), f"scored by {RIVAL}", f"scored by {goal.criterion}")


def _prepare(run: Run, goal: Goal, known: Known | None, plain: Goal | None = None) -> tuple[Run, Goal] | None:
    """The run that the goal begins with, scored where runs are remembered, and the goal that the scores are for. None
    where it names other kinds than ``plain`` and the model has none of them."""
    key = tuple(map(str, goal.kinds)), goal.criterion
    if known is None or key not in known:
        ready = prepare(run, goal)
        found = None if plain is not None and not _cuts_more(ready, goal, plain) else (ready, goal)
        if known is None or found is None:
            return found
        known[key] = score_as_able(*found)
    scored, wish = known[key]
    return replace(scored, request=run.request, tell=run.tell), wish.at(goal.budget)


def _cuts_more(ready: Run, goal: Goal, plain: Goal) -> bool:
    """Whether there is anything that the other goal would not cut, or it judges otherwise."""
    more = set(map(str, goal.kinds)) - set(map(str, plain.kinds))
    return not more or any(g.prunable and str(g.kind) in more for g in ready.program.need("groups"))


def _try(ready: Run, goal: Goal) -> tuple[Decided | None, Exception | None]:
    """(the plan, why there is none)"""
    try:
        return decide_on(ready, goal), None
    except (BudgetInfeasible, NothingToPrune) as error:
        return None, error


def _alike(one: Decided, two: Decided) -> bool:
    return one.run.program.need("plan").elements == two.run.program.need("plan").elements


def _nearer(best: Decided, found: Decided, other: Alternative) -> Decided:
    """The one of two plans that is nearer to dense once it is repaired."""
    run, goal = found.run, other.goal
    assert run.data is not None
    run.tell.stage(f"compare plans: {other.taken}")
    programs, fitted = (best.run.program, found.run.program), goal.recovery.method != "none"
    judged = compare_repaired(*programs, run.finders, run.data, run.seed, COMPARED, fitted)
    if judged is None:
        return best
    taken = replace(found, instead_of=best) if judged.surely_nearer else best
    return _add_note(taken, f"{other.left if taken is best else other.taken}: {judged}")


def _add_note(decided: Decided, text: str) -> Decided:
    run = decided.run.but(notes=(*decided.run.program.notes, text))
    return replace(decided, run=run, unfitted=decided.unfitted.but(notes=run.program.notes))
