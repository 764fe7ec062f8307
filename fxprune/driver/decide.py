"""From a goal to a plan: score, search, and what may follow: refined scores, rearranged masks, rounds, head scales."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..data.fixed_sizes import generate_for
from ..errors import InternalError
from ..ir.cost import Budget, CostModel
from ..ir.group import Kind
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..process import jobs, ranks
from ..process.environment import versions
from ..process.silence import silence
from .decide_latency import KnownLatency, attach_latency_table, refine_to_target
from .members import in_doubt, is_obs_nearer
from .parts import carry_out
from .proof import prove_prepared
from .rotation import has_bases, rotation_for
from .run import Run, find_groups, recover, reduce_tokens
from .samples import LEAST

if TYPE_CHECKING:
    from ..passes.analysis.importance.criterion import Criterion
    from ..passes.analysis.rank_within import RankWithin
    from ..passes.search.search_plan import SearchPlan
    from ..passes.transform.recover import Recover
    from ..request.goal import Goal

SWEPT = 128  # samples that head scales are compared on
FALL_BACK = ("activation", "l2")  # for models that other criteria say nothing about; the second needs no data


@dataclass(frozen=True)
class Decided:
    """A run whose program has its plan, and what is known of how that came about.

    run       dense, with groups, scores and the plan; once recovered, with the weights that were fitted
    unfitted  the same with the weights as they were
    recovery  what fitting them did, as plain data; None where there was none
    budget    that the plan was made under; None where there was none
    tiles     passes that choose zero tiles behind slicing, where they are stated in place of the request's
    instead_of   a plan that this one was preferred to, and that stands where this one cannot be carried out
    """

    run: Run
    unfitted: Program
    budget: Budget | None = None
    latency: KnownLatency = field(default_factory=lambda: KnownLatency())
    recovery: dict[str, Any] | None = None
    tiles: tuple[Pass, ...] = ()
    instead_of: Decided | None = None

    def recover(self, how: Recover) -> Decided:
        """The same plan with what stays fitted to the data, as ``how`` says."""
        behind = recover(self.run, how)
        if behind is self.run:
            return self
        return replace(self, run=behind, recovery=None if behind.record is None else behind.record.record())


def decide(run: Run, goal: Goal, rewrite: bool = True) -> Decided:
    """The run behind scoring and search: its dense program has a plan within the budget.

    With ``rounds`` above one the model is scored, cut a part of the way, recovered, and scored again as it then is; the
    steps are equal factors of the cost. The plan names elements of the dense model all the same, and the scores are
    those of the first round. Nothing of a round's weights stays: recovery starts from the dense ones.

    ``rewrite``: see :func:`prepare`
    """
    return decide_on(prepare(run, goal, rewrite), goal)


def prepare(run: Run, goal: Goal, rewrite: bool = True) -> Run:
    """The run with its groups, and the data that will be used: what every plan of it begins with.

    rewrite  residual streams, and queries, keys and values, are put into a basis of their own where their width may be
             cut; not where the weights of the result must fit other graphs. They stay where that goes wrong
    """
    turn = rotation_for(run, goal) if rewrite else None
    unmerge = goal.tokens is not None and goal.tokens.unmerge
    try:
        found = find_groups(run, goal.kinds, goal.tokens is not None, unmerge, "data" if rewrite else "", turn)
        found = prove_prepared(found)
    except InternalError as error:
        if not rewrite or not has_bases(goal):
            raise
        run.tell.warn(f"widths stay in the model's own basis: another failed, which is to be reported ({error.what})")
        return prepare(run, goal, rewrite=False)
    return replace(found, data=usable_data(found, goal))  # the report names what was used


def score(run: Run, goal: Goal) -> Run:
    """The run with the scores of the goal's criterion, and what they are worth together where the wanted kinds are cut
    from the end of an order, or may go entirely; as it is where it has scores already."""
    from ..passes.analysis.measure_rungs import WHOLE, MeasureRungs, find_emptied, find_tailed
    from ..passes.analysis.score_groups import ScoreGroups

    if run.program.scores is not None or not goal.by_groups:
        return run
    run = run.through(ScoreGroups(criterion=goal.scorer, seed=run.seed))
    wanted = (*goal.group_kinds, *(WHOLE if Kind.LAYER in goal.group_kinds else ()))
    measured = (*find_tailed(run.program, wanted), *find_emptied(run.program, wanted))
    kinds = tuple(dict.fromkeys(str(g.kind) for g in measured))
    if not kinds or not goal.scorer.measures_sets:
        return run
    return run.through(MeasureRungs(criterion=goal.scorer, kinds=kinds, seed=run.seed))


def score_as_able(run: Run, goal: Goal) -> tuple[Run, Goal]:
    """:func:`score`, and the goal that the scores are for: where the criterion says nothing about this model (it has no
    output to differentiate), the next one that does, with a warning."""
    from ..passes.analysis.importance.criterion import CannotScore

    try:
        return score(run, goal), goal
    except CannotScore as error:
        real = run.data is not None and not run.data.generated
        name = next(n for n in FALL_BACK if n != goal.scorer.name and (real or n != FALL_BACK[0]))
        why = f"{error.what}: {error.why}" if error.why else error.what
        run.tell.warn(f"'{goal.scorer.name}' cannot score this model ({why}): scored by '{name}' instead")
        scale = 1.0 if goal.head_scale == "auto" else goal.head_scale
        return score_as_able(run, replace(goal, criterion=name, members="auto", head_scale=scale, rearrange=0))


def decide_on(run: Run, goal: Goal) -> Decided:
    """:func:`decide` on what :func:`prepare` made; scores that are there (:func:`score`) are used, not made again."""
    from ..passes.transform.join_rounds import JoinRounds

    budget, criterion = goal.budget, goal.scorer
    run, goal, latency = attach_latency_table(run, goal)
    said = [repr(goal), str(criterion), repr(run.request.tiles)]
    jobs.identify(lambda: fingerprint(run.program, run.data, run.seed, said))
    run, goal = score_as_able(run, goal)
    if goal.tokens is not None:
        run, latency = _decide_with_tokens(run, goal, latency)
        return Decided(run, run.program, budget, latency)
    assert goal.budget is not None
    steps = amounts(goal, run.program)
    for number, part in enumerate(steps, 1):
        if number > 1:
            run = _next_round(run, goal)
        run = _decide_once(run, replace(goal, budget=part))
    if len(steps) > 1:
        run = run.through(JoinRounds())
    after, latency = refine_to_target(run, goal, latency, lambda by: _search_again(run.program, by))
    if after is not run.program:
        run = _rearrange(state_counts(run, after.need("plan"), goal.budget), goal)
    plan = run.program.need("plan")
    run = run.but(plan=replace(plan, about={**plan.about, **_about(run, goal), "rounds": len(steps)}))
    return Decided(run, run.program, budget, latency)


def _about(run: Run, goal: Goal) -> dict[str, Any]:
    """Where a plan comes from."""
    data = run.data
    return {
        "model": run.opened.name,
        "pipeline": run.pipeline,
        "importance": str(goal.scorer),
        "data": data.origin if data else None,
        "samples": data.samples if data else 0,
        "versions": versions(),
    }


def _score_beside_tokens(run: Run, goal: Goal) -> Run:
    """The run with scores where groups take part besides tokens.

    Scores are those of the dense graph: removals do not run side by side where tokens merge (methods C), and a head is
    worth what it is worth to all tokens. They do not depend on what a table of latencies says.
    """
    if not goal.by_groups:
        return run
    return _decide_once(run, replace(goal, budget=_reachable(goal, run.program), tokens=None, table=None))


def _decide_with_tokens(run: Run, goal: Goal, latency: KnownLatency) -> tuple[Run, KnownLatency]:
    """Tokens, and groups beside them where a budget leaves them something to give. What was decided, and measured where
    the budget is one of latency, is then stated as passes, which make the plan."""
    from ..passes.search.plan_tokens import PlanTokens
    from .decide_tokens import decide_tokens

    assert goal.tokens is not None
    scored = _score_beside_tokens(run, goal)
    plan = scored.program.plan
    scale = 1.0 if plan is None else float(plan.about.get("head_scale", 1.0))
    scores: dict[str, list[list[float]]] = {}  # of tokens, for all rounds of measurement

    def decide_by(by: Goal) -> Program:
        run.tell.stage("schedule tokens")
        with silence():
            search = _search(by, scale) if by.by_groups else None
            return scored.program.but(plan=decide_tokens(scored, by, search, scores))

    first = scored.on(decide_by(goal))
    after, latency = refine_to_target(first, goal, latency, decide_by)
    found = after.need("plan")
    removed = {} if found.tokens is None else found.tokens.removed  # none where groups take all of it
    counts = tuple(removed.get(site.name, 0) for site in run.program.need("tokens").usable)
    stated = scored.through(PlanTokens(goal.tokens.reducer, counts, None if goal.by_groups else goal.budget))
    reduced = reduce_tokens(stated.program, run.finders)
    if goal.by_groups and goal.table is None:
        stated = stated.through(_search(goal, scale))
    elif goal.by_groups:
        stated = state_counts(stated, found, goal.budget)
    plan = stated.program.need("plan")
    table = {k: v for k, v in found.about.items() if k == "latency_table"}
    about = {
        **plan.about,
        **table,
        **_about(stated, goal),
        "rounds": 1,
        "tokens": goal.tokens.text,
        "seed": run.seed,
        "budget": None if goal.budget is None else str(goal.budget),
        "dense": vars(CostModel(run.program)()),
        "predicted": vars(CostModel(reduced)(plan.sizes(reduced.need("groups")))),
    }
    return stated.but(plan=CompressionPlan(plan.choices, about)), latency


def _reachable(goal: Goal, program: Program) -> Budget:
    """The goal's budget, or the least that groups alone can reach: tokens take the rest. For scores and orders only,
    so that a share of the latency is as good as one of the MACs."""
    assert goal.budget is not None
    asked, kinds = goal.budget, {str(k) for k in goal.group_kinds}
    if asked.metric == "latency":
        asked = Budget("flops", asked.amount / (1.0 if asked.relative or goal.table is None else goal.table.dense_ms))
    model, metric = CostModel(program), asked.metric
    least = model({g.axis: g.levels()[0] for g in program.need("groups") if g.prunable and str(g.kind) in kinds})
    limit = max(asked.limit(model()), 1.001 * least.metric(metric))
    return Budget(metric, min(limit, float(model().metric(metric))), relative=False)


def usable_data(run: Run, goal: Goal) -> Calibration | None:
    """The data that will be used: none when nothing needs any, made up (loudly) when nobody gave some."""
    if not goal.needs_data:
        return None
    if run.data is None:
        return make_up_data(run, f"'{goal.criterion}' scores", goal.samples)
    return without_labels_of_others(run, run.data)


def make_up_data(run: Run, who: str, samples: int | str) -> Calibration:
    """Generated inputs, with a warning that names who is content with them."""
    run.tell.warn(
        f"no data was given: {who} on generated inputs, which are not what the model "
        "will see; give `--data` for a better choice"
    )
    return generate_for(run.program, run.opened.source, LEAST if isinstance(samples, str) else samples, run.seed)


def without_labels_of_others(run: Run, data: Calibration) -> Calibration:
    """The data, without labels that no output of the model predicts (with a warning)."""
    from ..passes.analysis.importance.objective import without_foreign_labels

    bare = without_foreign_labels(run.program, data) if data.labelled else data
    if data.labelled and not bare.labelled:
        run.tell.warn(f"the labels in {data.origin} are left out: no output of the model predicts them")
    return bare


def amounts(goal: Goal, program: Program) -> list[Budget]:
    """The budget of every round, as a share of the whole model: equal factors of the cost, the last one the goal's
    own."""
    assert goal.budget is not None
    if goal.rounds == 1:
        return [goal.budget]
    dense = CostModel(program)()
    share = min(1.0, goal.budget.limit(dense) / dense.metric(goal.budget.metric))
    return [Budget(goal.budget.metric, round(share ** (i / goal.rounds), 6)) for i in range(1, goal.rounds)] + [
        goal.budget
    ]


def _decide_once(run: Run, goal: Goal) -> Run:
    """Score and search; score what the search left in doubt again; weigh heads; choose members; rearrange."""
    from ..passes.analysis.rank_within import RankWithin

    search = _search(goal, 1.0 if goal.head_scale == "auto" else goal.scale)
    members = RankWithin(found=goal.ranks) if goal.by_obs and run.data is not None else None
    run = score(run, goal)
    if members is not None and goal.members == "auto" and in_doubt(run.program):
        run = _search_through(run, *searching(search, goal.scorer, run.seed, None))
        run = _nearer(run, _search_through(run, members, search))
    else:
        run = _search_through(run, *searching(search, goal.scorer, run.seed, members))
    if goal.head_scale == "auto" and run.data is not None:
        best, told = best_scale(run.program, search, run.data)
        run = _search_through(run.but(notes=(*run.program.notes, told)), replace(search, head_scale=best))
    return _rearrange(run, goal)


def _nearer(scored: Run, ranked: Run) -> Run:
    """The one of two runs, by scores and by OBS, whose plan is nearer to dense once it is repaired."""
    scored.tell.stage("choose members")
    assert scored.data is not None
    with silence():
        taken, told = is_obs_nearer(scored.program, ranked.program, scored.finders, scored.data, scored.seed)
    chosen = ranked if taken else scored
    return chosen.but(notes=(*chosen.program.notes, told)) if told else chosen


def _rearrange(run: Run, goal: Goal) -> Run:
    """The run with members chosen again by what they do together, where that is asked for."""
    from ..passes.search.rearrange import Rearrange

    return run.through(Rearrange(goal.rearrange)) if goal.rearrange else run


def _search_again(program: Program, goal: Goal) -> Program:
    """The program with the plan of the same search by the goal's table, which measuring corrected. Members as scores
    and ranks have them: how many stay is all that a clock can tell."""
    return _search(goal, float(program.need("plan").about.get("head_scale", 1.0))).run(program)


def _search_through(run: Run, *passes: Pass) -> Run:
    """``run.through``; a search by measured time is stated by what it decided."""
    from ..passes.search.search_plan import SearchPlan

    for one in passes:
        if isinstance(one, SearchPlan) and one.table is not None:
            run.tell.stage("search plan")
            with silence():
                found = one.run(run.program).need("plan")
            run = state_counts(run, found, one.budget)
        else:
            run = run.through(one)
    return run


def state_counts(run: Run, plan: CompressionPlan, budget: Budget | None) -> Run:
    """The run with ``plan``, which a search by measured time made of its scores, said as counts in the pipeline:
    neither a clock nor a table is at hand where it runs again. ``budget``: of that search"""
    from ..passes.search.keep_counts import KeepCounts, counts_of

    run = run.through(KeepCounts(counts_of(plan), budget))
    if run.program.need("plan").elements != plan.elements:
        raise InternalError("counts do not say what the search decided", pipeline=run.pipeline)
    return run.but(plan=plan)


def _search(goal: Goal, head_scale: float) -> SearchPlan:
    from ..passes.search.search_plan import SearchPlan

    assert goal.budget is not None
    return SearchPlan(goal.budget, kinds=goal.group_kinds, method=goal.search, head_scale=head_scale, table=goal.table)


def searching(search: SearchPlan, criterion: Criterion, seed: int, members: RankWithin | None) -> list[Pass]:
    """The passes from scores to a plan: search, score what that left in doubt again, choose members, search again."""
    from ..passes.analysis.importance.criterion import Criterion
    from ..passes.analysis.refine_scores import RefineScores

    again: list[Pass] = []
    if type(criterion).refine is not Criterion.refine:
        again.append(RefineScores(criterion=criterion, seed=seed))
    if members is not None:
        again.append(members)
    return [search, *again, search] if again else [search]


def best_scale(program: Program, search: SearchPlan, data: Calibration) -> tuple[float, str]:
    """The head scale whose plan, without recovery, keeps the outputs closest to the dense ones; and what was found."""
    from ..passes.analysis.importance.damage import Reference, divergences
    from ..passes.analysis.importance.obs import first
    from ..passes.search.search_plan import HEAD_SCALES, HEADS

    if not any(g.prunable and g.kind in HEADS for g in program.need("groups")):
        return search.head_scale, "head scale: there are no heads to weigh"
    batches, found, dense = first(data.batches, SWEPT), {}, Reference(program)
    for scale in HEAD_SCALES:
        small = carry_out(replace(search, head_scale=scale).run(program))
        found[scale] = float(ranks.agree({"kept": divergences(dense, small, batches).mean()})["kept"])
    best = min(found, key=lambda scale: (found[scale], abs(scale - 1.0)))
    told = ", ".join(f"{scale:g}: {value:.3g}" for scale, value in found.items())
    return best, f"head scale {best:g} (divergence of the outputs by scale: {told})"


def _next_round(run: Run, goal: Goal) -> Run:
    """What the plan of a round leaves: recovered, sliced, with its groups under the limits of the whole program's."""
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.analysis.start_round import StartRound
    from ..passes.transform.recover import Recover
    from ..passes.transform.slice_axes import SliceAxes

    fits = goal.recovery.method != "none" and run.data is not None
    how = [Recover(method="ridge", seed=run.seed)] if fits else []
    small = run.through(StartRound(), *how, SliceAxes())
    freeze = run.find_groups.freeze
    return small.on(small.program.without_facts()).through(PropagateAxes(), FindGroups(freeze=freeze, inherit=True))
