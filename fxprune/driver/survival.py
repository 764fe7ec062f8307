"""A result that lost the dense model's answers says so, and what would keep them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..data.batch import Calibration
from ..errors import BudgetInfeasible
from ..ir.cost import METRICS, Budget, CostModel
from ..process.silence import silence
from ..report.headline import Headline, headline
from .decide import Decided
from .judge import AgreementEvaluator, few
from .parts import carry_out
from .run import fit_by_ridge

LOST = 0.5  # of the dense model's answers, or of what its outputs tell apart: below, the result is another model
WANTED = (0.9, 0.99)
TRIED = (0.25, 0.5, 0.75)  # of the way from the budget to the whole model
FITTED = 64  # samples that a trial is repaired on: enough to tell a tenth of the answers, few enough to cost seconds


def tell_of_lost_answers(decided: Decided, agreement: Mapping[str, Any]) -> None:
    """Warn where less than half of the dense model's answers survive: how many, what budget would keep 90 and 99 % of
    them, what else would help. A sweep tells nothing: it is there to show where answers go."""
    first = headline({"agreement": agreement})
    if first is None or _survives(first) >= LOST or decided.run.request.options.get("command") == "sweep":
        return
    chance = agreement.get("chance")
    luck = f" (always giving one answer: {chance:.4f})" if chance is not None and first.measure == "top1" else ""
    said = f"the result has lost the dense model's answers: {first.about}, {first}{luck}"
    decided.run.tell.stage("estimate what budget would keep the answers")
    with silence():
        kept = estimate_budgets(decided)
    decided.run.tell.warn("; ".join([said, *_in_words(decided.budget, kept), _cures(decided)]))


def estimate_budgets(decided: Decided) -> dict[float, float]:
    """Share of the answers -> about what share of the dense cost keeps so many, from a few plans between the budget and
    the whole model, each repaired by ridge where data may be fitted to, and judged as the result was; values between
    them by straight lines.

    Empty where no search can be run again: a plan or counts that were given, tokens, budgets of time, generated data.
    """
    run, goal, budget, dense = decided.run, decided.run.request.goal, decided.budget, decided.unfitted
    data = run.opened.held or run.data
    searchable = goal is not None and goal.tokens is None and dense.scores is not None
    if budget is None or budget.metric not in METRICS or not searchable or data is None:
        return {}
    from ..passes.analysis.importance.obs import first
    from ..passes.search.search_plan import SearchPlan

    assert goal is not None
    whole = CostModel(dense)()
    share = budget.limit(whole) / max(whole.metric(budget.metric), 1)
    judge, little = (
        AgreementEvaluator(dense, few(dense, data)),
        run.data and Calibration(tuple(first(run.data.batches, FITTED)), run.data.origin),
    )
    points: list[tuple[float, float]] = [(1.0, 1.0)]
    for part in sorted(TRIED, reverse=True):
        amount = round(share + part * (1 - share), 4)
        try:
            planned = SearchPlan(Budget(budget.metric, amount), kinds=goal.group_kinds, method=goal.search).run(dense)
        except BudgetInfeasible:
            break
        repaired = planned if little is None else fit_by_ridge(planned, run.finders, little, run.seed)
        figures = judge.of(carry_out(repaired))
        points.append((amount, _share_kept(figures)))
        if points[-1][1] < WANTED[0]:  # nothing below keeps more
            break
    return {wanted: found for wanted in WANTED if (found := _cost_of(wanted, points)) is not None}


def _cost_of(wanted: float, points: list[tuple[float, float]]) -> float | None:
    """Where straight lines between (cost, kept), costs falling, fall to ``wanted``; the last cost where none does.

    >>> _cost_of(0.9, [(1.0, 1.0), (0.8, 0.95), (0.6, 0.75)])
    0.75
    """
    for (dear, more), (cheap, less) in pairwise(points):
        if less < wanted <= more:
            return round(cheap + (dear - cheap) * (wanted - less) / max(more - less, 1e-9), 3)
    return points[-1][0] if len(points) > 1 else None


def _share_kept(figures: Mapping[str, float]) -> float:
    return next((figures[name] for name in ("top1", "relational", "cosine") if name in figures), 0.0)


def _survives(first: Headline) -> float:
    if first.measure == "accuracy":
        return first.value / first.dense if first.dense else 1.0
    return first.value


def _in_words(budget: Budget | None, kept: Mapping[float, float]) -> list[str]:
    """A sentence on the budgets that would keep more, where any is known."""
    if budget is None or not kept:
        return []
    parts = [f"about `--{budget.metric} {amount:g}` keeps {100 * wanted:g} %" for wanted, amount in kept.items()]
    return [f"{' and '.join(parts)} of them (estimated from a few plans)"]


def _cures(decided: Decided) -> str:
    """What may help besides a larger budget."""
    how, data = (decided.recovery or {}).get("asked", "none"), decided.run.opened.data
    if data is None or data.generated:
        return "a larger budget helps most, real data (`--data`) may"
    better = "`--recover auto`" if how == "none" else "`--recover tune`" if how != "tune" else "`--importance fisher`"
    return f"a larger budget helps most, {better} and more `--samples` may"
