"""An explicit pipeline, run as far as slicing: what its passes decide becomes the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..data.fingerprint import fingerprint
from ..errors import BudgetInfeasible, OptionError
from ..ir.cost import METRICS, Budget, CostModel
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import FACTS
from ..process import jobs
from ..process.environment import versions
from .apply import tell_of_odd_counts
from .decide import Decided, make_up_data, without_labels_of_others
from .decide_latency import KnownLatency, recall_latency_table
from .proof import prove_prepared
from .run import Run, count_kept, reduce_tokens
from .stated import COUNTED, OPTION, StatedPipeline, _check_needs, kinds_added


def run_stated(run: Run, stated: StatedPipeline) -> Decided:
    """The dense program with the plan that the stated passes make.

    Passes that score or recover get the calibration data; where none was given, it is made up for criteria that need
    some, with a warning, and recovery is an error. A plan that is read stays as it is, with what it says about itself.

    Raises BudgetInfeasible where counts are stated with a budget that they exceed.
    """
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.align_heads import AlignHeads
    from ..passes.transform.recover import Recover
    from ..passes.transform.rotate_width import RotateWidth
    from ..passes.transform.slice_axes import SliceAxes

    opened, before, data = run.opened, run.program, run.data
    said = [stated.text, *([] if stated.plan is None else [stated.plan.digest])]
    jobs.identify(lambda: fingerprint(before, data, run.seed, said))
    unfitted, recovery = None, None
    found_by = [k.find.slug() for k in kinds_added([p.slug() for p in stated.before])]
    for number, one in enumerate(stated.before):
        if isinstance(one, FindGroups) and not one.inherit:
            run = replace(run, find_groups=one)
        if one.slug() in found_by:
            run = replace(run, others=(*(p for p in run.others if p.slug() != one.slug()), one))
        if "data" in one.takes:
            run = _with_data(run, one, first=number == _first(stated))
        _check_needs(one, {f for f in FACTS if getattr(run.program, f) is not None}, stated.before)
        last = isinstance(one, Recover) and run.program.whole is None  # of the result, not of a round
        unfitted = run.program if last else unfitted
        run = run.through(one)
        rewriting = (AlignHeads, RotateWidth)
        rewritten = any(isinstance(later, rewriting) for later in stated.before[number + 1 :])
        ready = isinstance(one, (FindGroups, *rewriting)) and not rewritten
        if ready and run.program.axes is not None and run.program.proof == before.proof:
            run = prove_prepared(run)
        if isinstance(one, SliceAxes):  # of a round; where nothing was cut, facts are still those of before
            run = run.on(run.program.without_facts())
        if last and run.record is not None:
            recovery = run.record.record()
    sliced = any("plan" in one.gives for one in stated.before)
    if not sliced:  # tiles alone
        if run.program.groups is None:
            run = run.through(PropagateAxes(), *run.finders)
        run = run.but(plan=CompressionPlan())
    plan = _check_plan(run.program.plan, stated)
    latency = KnownLatency()
    if sliced:
        _check_counts(run, stated.before)
        latency = recall_latency_table(run, stated.budget, kept=not stated.read)
    if stated.read:
        tell_of_odd_counts(run, plan)
    else:
        used = run.data
        about = {
            **({"rounds": 1} if sliced else {}),
            **plan.about,
            "model": opened.name,
            "pipeline": run.pipeline,
            "importance": stated.criterion,
            "data": used.origin if used else None,
            "samples": used.samples if used else 0,
            "versions": versions(),
        }
        run = run.but(plan=replace(plan, about=about))
    unfitted = run.program if unfitted is None else unfitted
    return Decided(run, unfitted, stated.budget, latency, recovery, stated.tiles)


def _check_plan(plan: CompressionPlan | None, stated: StatedPipeline) -> CompressionPlan:
    """The plan that is sliced by. Raises OptionError where none is left, and where its tiles meet others."""
    if plan is None:
        raise OptionError(
            "the plan is gone when it is time to slice",
            where=f"{OPTION} {stated.text}",
            why="a pass behind the search changed the graph, and facts about the old one were dropped",
            cure="put passes that change the graph before propagate-axes",
        )
    if plan.blocks and stated.tiles:
        raise OptionError(
            "the plan holds tiles, and the pipeline plans others",
            where=f"{OPTION} .. {stated.tiles[0]}",
            cure="leave the passes of tiles away, or take them out of the plan",
        )
    return plan


def _with_data(run: Run, one: Pass, first: bool) -> Run:
    """The run with the data that a pass is to have: made up where a criterion needs some and nobody gave any, without
    labels that the model does not predict (looked at once, by the first pass that takes data)."""
    criterion = getattr(one, "criterion", None) if "criterion" in one.takes else None
    data = run.data
    if data is None and criterion is not None and criterion.needs_data:
        data = make_up_data(run, f"'{criterion}' scores", run.request.samples)
    if data is not None and first:
        data = without_labels_of_others(run, data)
    return replace(run, data=data)


def _check_counts(run: Run, passes: Sequence[Pass]) -> None:
    """Raise BudgetInfeasible where counts exceed the budget that is stated with them; time is not reckoned here."""
    last = next((p for p in reversed(passes) if "budget" in p.takes), None)
    bound = getattr(last, "budget", None)
    if last is None or last.slug() not in COUNTED or not isinstance(bound, Budget) or bound.metric not in METRICS:
        return
    small = reduce_tokens(run.program, run.finders)
    limit, now = bound.limit(CostModel(run.program)()), CostModel(small)(count_kept(small)).metric(bound.metric)
    if now > limit:
        raise BudgetInfeasible(
            "the counts exceed the budget that is stated with them",
            where=f"{OPTION} .. {last}",
            why=f"{bound.metric} {now:,}, at most {limit:,.0f}",
            cure="state fewer, or leave budget away",
        )


def _first(stated: StatedPipeline) -> int:
    """The first pass that takes data: labels are looked at once, on the graph as it is then."""
    return next((i for i, p in enumerate(stated.before) if "data" in p.takes), -1)
