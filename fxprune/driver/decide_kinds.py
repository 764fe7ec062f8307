"""With data nobody has to choose kinds: a plan that may also cut widths of attentions and of the residual stream is
held against the plain one, both repaired, on samples that repaired neither."""

from __future__ import annotations

from dataclasses import replace

from ..errors import BudgetInfeasible, NothingToPrune
from ..request.goal import Goal
from .decide import Decided, decide, decide_on, prepare
from .members import compare_repaired
from .run import Run

ENOUGH = 64  # samples; with fewer a difference of the outputs is chance
COMPARED = 384  # samples: half of them repair, the others judge


def decide_among(run: Run, goal: Goal) -> Decided:
    """:func:`decide` for the goal's kinds, and for the wider ones where the goal names any and data can judge: the
    wider plan is taken where its outputs lie nearer to the dense ones by more than one standard error, or where the
    plain one cannot reach the budget."""
    plain = replace(goal, wider=())
    if not goal.wider or run.data is None or run.data.generated or run.data.samples < ENOUGH:
        return decide(run, plain)
    try:
        first = decide(run, plain)
    except (BudgetInfeasible, NothingToPrune) as error:
        found = _decide_wider(run, goal)
        if found is None:
            raise
        return _noted(found, f"{_named(goal)} may go as well: without them the budget is out of reach ({error.what})")
    second = _decide_wider(run, goal)
    if second is None or second.run.program.need("plan").elements == first.run.program.need("plan").elements:
        return first
    run.tell.stage("choose kinds")
    fitted = goal.recovery.method != "none"
    programs, data = (first.run.program, second.run.program), run.data
    judged = compare_repaired(*programs, second.run.finders, data, run.seed, COMPARED, fitted)
    if judged is None:
        return first
    taken = second if judged.surely_nearer else first
    less = "may go as well" if taken is second else "stay whole"
    return _noted(taken, f"{_named(goal)} {less}: {judged}")


def _decide_wider(run: Run, goal: Goal) -> Decided | None:
    """The plan with the wider kinds; None where the model has none of them to cut, or they do not reach it either."""
    wide = replace(goal, kinds=(*goal.kinds, *goal.wider), wider=())
    ready = prepare(run, wide)
    names = set(map(str, goal.wider))
    if not any(g.prunable and str(g.kind) in names for g in ready.program.need("groups")):
        return None
    try:
        return decide_on(ready, wide)
    except (BudgetInfeasible, NothingToPrune):
        return None


def _named(goal: Goal) -> str:
    return ", ".join(map(str, goal.wider))


def _noted(decided: Decided, text: str) -> Decided:
    run = decided.run.but(notes=(*decided.run.program.notes, text))
    return replace(decided, run=run, unfitted=decided.unfitted.but(notes=run.program.notes))
