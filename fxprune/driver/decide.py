"""From a wish to a plan: score, search, and what may follow: refined scores, rearranged masks, rounds, head scales."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..data.sources import generate
from ..errors import InternalError
from ..ir.cost import Budget, CostModel
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..process import jobs, ranks
from ..process.environment import versions
from .decide_latency import prepared, settled

if TYPE_CHECKING:
    from ..passes.analysis.importance.criterion import Criterion
    from ..passes.analysis.rank_within import RankWithin
    from ..passes.search.search_plan import SearchPlan
    from ..request.goal import Wish
    from .run import Work

SWEPT = 128  # samples that head scales are compared on


def decide(work: Work, wish: Wish) -> Program:
    """The dense program with its scores and a plan within the budget.

    With ``rounds`` above one the model is scored, cut a part of the way, recovered, and scored again as it then is; the
    steps are equal factors of the cost. The plan names elements of the dense model all the same, and the scores are
    those of the first round. Nothing of a round's weights stays: recovery starts from the dense ones.
    """
    program, data = ready(work, wish)
    return decide_on(work, wish, program, data)


def ready(work: Work, wish: Wish) -> tuple[Program, Calibration | None]:
    """The dense program with its groups, and the data that will be used: what every plan of it begins with."""
    program = work.groups(wish.kinds, wish.tokens is not None, wish.tokens is not None and wish.tokens.unmerge)
    data = work.calibration = calibration(work, wish, program)  # the report names what was used
    return program, data


def score(work: Work, wish: Wish, program: Program, data: Calibration | None) -> Program:
    """``program`` with the scores of the wish's criterion; as it is where it has scores already."""
    from ..passes.analysis.score_groups import ScoreGroups

    if program.scores is not None or not wish.by_groups:
        return program
    return work.run(program, ScoreGroups(criterion=wish.made, data=data, seed=work.seed))


def decide_on(work: Work, wish: Wish, program: Program, data: Calibration | None) -> Program:
    """:func:`decide` on what :func:`ready` made; scores that are there (:func:`score`) are used, not made again."""
    from ..passes.transform.join_rounds import JoinRounds

    work.budget, chosen = wish.budget, wish.made
    wish, program = prepared(work, wish, program)
    jobs.identify(lambda: fingerprint(program, data, work.seed, [repr(wish), str(chosen), repr(work.blocks)]))
    if wish.tokens is not None:
        return _with_tokens(work, wish, program, data)
    assert wish.budget is not None
    steps = amounts(wish, program)
    for number, budget in enumerate(steps, 1):
        if number > 1:
            program = _next_round(work, wish, program)
        program = _once(work, replace(wish, budget=budget), program, data)
    if len(steps) > 1:
        program = work.run(program, JoinRounds())
    after = settled(work, wish, program)
    if after is not program:
        program = stated_counts(work, program, after.need("plan"), wish.budget)
    plan = program.need("plan")
    return program.but(plan=replace(plan, about={**plan.about, **_about(work, wish, data), "rounds": len(steps)}))


def _about(work: Work, wish: Wish, data: Calibration | None) -> dict[str, Any]:
    """Where a plan comes from."""
    return {
        "model": work.name,
        "pipeline": work.pipeline,
        "importance": str(wish.made),
        "data": data.origin if data else None,
        "samples": data.samples if data else 0,
        "versions": versions(),
    }


def _scored_beside_tokens(work: Work, wish: Wish, program: Program, data: Calibration | None) -> Program:
    """The program with scores where groups take part besides tokens.

    Scores are those of the dense graph: removals do not run side by side where tokens merge (methods C), and a head is
    worth what it is worth to all tokens. They do not depend on what a table of latencies says.
    """
    if not wish.by_groups:
        return program
    return _once(work, replace(wish, budget=_reachable(wish, program), tokens=None, table=None), program, data)


def _with_tokens(work: Work, wish: Wish, program: Program, data: Calibration | None) -> Program:
    """Tokens, and groups beside them where a budget leaves them something to give. What was decided, and measured where
    the budget is one of latency, is then stated as passes, which make the plan."""
    from ..passes.search.plan_tokens import PlanTokens
    from ..process.silence import silence
    from .decide_tokens import decide_tokens

    assert wish.tokens is not None
    scored = _scored_beside_tokens(work, wish, program, data)
    scale = 1.0 if scored.plan is None else float(scored.plan.about.get("head_scale", 1.0))
    scores: dict[str, list[list[float]]] = {}  # of tokens, for all rounds of measurement

    def decided(by: Wish) -> Program:
        work.stage("schedule tokens")
        with silence():
            search = _search(by, scale) if by.by_groups else None
            return scored.but(plan=decide_tokens(work, by, scored, data, search, scores))

    found = settled(work, wish, decided(wish), decided).need("plan")
    assert found.tokens is not None
    counts = tuple(found.tokens.removed.get(site.name, 0) for site in program.need("tokens").usable)
    scored = work.run(scored, PlanTokens(found.tokens.reducer, counts, None if wish.by_groups else wish.budget))
    reduced = work.reduced(scored)
    if wish.by_groups:
        scored = (
            work.run(scored, replace(_search(wish, scale), reduced=reduced))
            if wish.table is None
            else stated_counts(work, scored, found, wish.budget)
        )
    plan = scored.need("plan")
    table = {k: v for k, v in found.about.items() if k == "latency_table"}
    kept = {g.axis: len(plan.choices[g.name].keep) for g in reduced.need("groups") if g.name in plan.choices}
    about = {
        **plan.about,
        **table,
        **_about(work, wish, data),
        "rounds": 1,
        "tokens": wish.tokens.text,
        "seed": work.seed,
        "budget": None if wish.budget is None else str(wish.budget),
        "dense": vars(CostModel(program)()),
        "predicted": vars(CostModel(reduced)(kept)),
    }
    return scored.but(plan=CompressionPlan(plan.choices, about, plan.tokens))


def _reachable(wish: Wish, program: Program) -> Budget:
    """The wish's budget, or the least that groups alone can reach: tokens take the rest. For scores and orders only,
    so that a share of the latency is as good as one of the MACs."""
    assert wish.budget is not None
    asked, kinds = wish.budget, {str(k) for k in wish.group_kinds}
    if asked.metric == "latency":
        asked = Budget("flops", asked.amount / (1.0 if asked.relative or wish.table is None else wish.table.dense_ms))
    model, metric = CostModel(program), asked.metric
    least = model({g.axis: g.levels()[0] for g in program.need("groups") if g.prunable and str(g.kind) in kinds})
    limit = max(asked.limit(model()), 1.001 * least.metric(metric))
    return Budget(metric, min(limit, float(model().metric(metric))), relative=False)


def calibration(work: Work, wish: Wish, program: Program) -> Calibration | None:
    """The data that will be used: none when nothing needs any, made up (loudly) when nobody gave some."""
    if not wish.needs_data:
        return None
    if work.calibration is None:
        return made_up(work, program, wish.criterion, wish.samples)
    return without_labels_of_others(work, program, work.calibration)


def made_up(work: Work, program: Program, criterion: str, samples: int) -> Calibration:
    """Generated inputs, with a warning."""
    assert work.source is not None
    work.warn(
        f"no data was given: '{criterion}' scores on generated inputs, which are not what the model "
        "will see; give --data (data=...) for a better choice"
    )
    return generate_for(program, work.source, samples, work.seed)


def without_labels_of_others(work: Work, program: Program, data: Calibration) -> Calibration:
    """The data, without labels that no output of the model predicts (with a warning)."""
    from ..passes.analysis.importance.objective import without_foreign_labels

    bare = without_foreign_labels(program, data) if data.labelled else data
    if data.labelled and not bare.labelled:
        work.warn(f"the labels in {data.origin} are left out: no output of the model predicts them")
    return bare


def amounts(wish: Wish, program: Program) -> list[Budget]:
    """The budget of every round, as a share of the whole model: equal factors of the cost, the last one the wish's
    own."""
    assert wish.budget is not None
    if wish.rounds == 1:
        return [wish.budget]
    dense = CostModel(program)()
    share = min(1.0, wish.budget.limit(dense) / dense.metric(wish.budget.metric))
    return [Budget(wish.budget.metric, round(share ** (i / wish.rounds), 6)) for i in range(1, wish.rounds)] + [
        wish.budget
    ]


def _once(work: Work, wish: Wish, program: Program, data: Calibration | None) -> Program:
    """Score and search; score what the search left in doubt again; weigh heads; choose members; rearrange."""
    from ..passes.analysis.rank_within import RankWithin
    from ..passes.search.rearrange import Rearrange

    search = _search(wish, 1.0 if wish.head_scale == "auto" else wish.scale)
    members = RankWithin(data=data, found=wish.ranks) if wish.by_obs and data is not None else None
    program = _run(work, score(work, wish, program, data), *searching(search, wish.made, data, work.seed, members))
    if wish.head_scale == "auto" and data is not None:
        best, told = best_scale(program, search, data)
        program = _run(work, program.but(notes=(*program.notes, told)), replace(search, head_scale=best))
    return work.run(program, Rearrange(wish.rearrange)) if wish.rearrange else program


def _run(work: Work, program: Program, *passes: Pass) -> Program:
    """``work.run``; a search by measured time is stated by what it decided."""
    from ..passes.search.search_plan import SearchPlan
    from ..process.silence import silence

    for one in passes:
        if isinstance(one, SearchPlan) and one.table is not None:
            work.stage("search plan")
            with silence():
                found = one.run(program).need("plan")
            program = stated_counts(work, program, found, one.budget)
        else:
            program = work.run(program, one)
    return program


def stated_counts(work: Work, program: Program, plan: CompressionPlan, budget: Budget | None) -> Program:
    """The program with ``plan``, which a search by measured time made of its scores, said as counts in the pipeline:
    neither a clock nor a table is at hand where it runs again. ``budget``: of that search"""
    from ..passes.search.keep_counts import KeepCounts, counts_of

    program = work.run(program, KeepCounts(counts_of(plan), budget))
    if program.need("plan").choices != plan.choices:
        raise InternalError("counts do not say what the search decided", pipeline=work.pipeline)
    return program.but(plan=plan)


def _search(wish: Wish, head_scale: float) -> SearchPlan:
    from ..passes.search.search_plan import SearchPlan

    assert wish.budget is not None
    return SearchPlan(wish.budget, kinds=wish.group_kinds, method=wish.search, head_scale=head_scale, table=wish.table)


def searching(
    search: SearchPlan, criterion: Criterion, data: Calibration | None, seed: int, members: RankWithin | None
) -> list[Pass]:
    """The passes from scores to a plan: search, score what that left in doubt again, choose members, search again."""
    from ..passes.analysis.importance.criterion import Criterion
    from ..passes.analysis.refine_scores import RefineScores

    again: list[Pass] = []
    if type(criterion).refine is not Criterion.refine:
        again.append(RefineScores(criterion=criterion, data=data, seed=seed))
    if members is not None:
        again.append(members)
    return [search, *again, search] if again else [search]


def best_scale(program: Program, search: SearchPlan, data: Calibration) -> tuple[float, str]:
    """The head scale whose plan, without recovery, keeps the outputs closest to the dense ones; and what was found."""
    from ..passes.analysis.importance.damage import Reference, divergences
    from ..passes.analysis.importance.obs import first
    from ..passes.search.search_plan import HEAD_SCALES, HEADS
    from ..passes.transform.slice_axes import SliceAxes

    if not any(g.prunable and g.kind in HEADS for g in program.need("groups")):
        return search.head_scale, "head scale: there are no heads to weigh"
    batches, found, dense = first(data.batches, SWEPT), {}, Reference(program)
    for scale in HEAD_SCALES:
        small = SliceAxes().run(replace(search, head_scale=scale).run(program))
        found[scale] = float(ranks.agree({"kept": divergences(dense, small, batches).mean()})["kept"])
    best = min(found, key=lambda scale: (found[scale], abs(scale - 1.0)))
    told = ", ".join(f"{scale:g}: {value:.3g}" for scale, value in found.items())
    return best, f"head scale {best:g} (divergence of the outputs by scale: {told})"


def _next_round(work: Work, wish: Wish, program: Program) -> Program:
    """What the plan of a round leaves: recovered, sliced, with its groups under the limits of the whole program's."""
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.analysis.start_round import StartRound
    from ..passes.transform.recover import Recover
    from ..passes.transform.slice_axes import SliceAxes

    how = (
        []
        if wish.recovery.method == "none" or work.calibration is None
        else [Recover(method="ridge", data=work.calibration, seed=work.seed)]
    )
    small = work.run(program, StartRound(), *how, SliceAxes())
    return work.run(small.without_facts(), PropagateAxes(), FindGroups(freeze=work.find_groups.freeze, inherit=True))
