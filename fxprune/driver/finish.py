"""The last stage of a run: slice, prove that slicing equals masking, report, lower, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.artifact import Artifact, build_report
from ..artifact.delivered import DeliveredLatency
from ..errors import InternalError
from ..ir.cost import Cost, CostModel
from ..ir.flops import check_counts
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..ir.proof import Link
from ..ir.rebuild import owning
from ..ir.token_flow import TokenFlow, describe_tokens
from ..process import ranks
from ..process.silence import silence
from ..report.entries import frozen_entries, group_entries, token_entries
from ..report.op_gaps import op_gaps
from ..request.latency import FILE
from ..request.options import plain
from ..target.footprint import COUNTED, footprint
from .decide import Decided
from .decide_latency import describe_latency
from .decide_tiles import Zeroed, zero_tiles
from .judge import AgreementEvaluator, few
from .measure_latency import lowerable
from .parts import carry_out
from .proof import compare_with_masking
from .run import Run, carry_out_parts, count_kept, reduce_tokens
from .survival import tell_of_lost_answers

PICTURE = "tokens.png"


@dataclass(frozen=True)
class Sliced:
    """What slicing made of a plan.

    run       behind the last pass: its program is the result
    reduced   the dense program as it was cut, with its tokens reduced;  cut: what slicing left of that
    plan      the whole plan, tiles included
    counted   what the result costs;  masked: how exact slicing was;  zeroed: what was made of it with zeros in weights
    """

    run: Run
    reduced: Program
    cut: Program
    plan: CompressionPlan
    counted: Cost
    masked: Link
    zeroed: Zeroed | None


def finish(decided: Decided, after: Sequence[Pass] = ()) -> Artifact:
    """Slice, prove that slicing equals masking, report, and lower and save where the request's ``out`` says.

    after   passes that were asked for behind slicing
    """
    run = decided.run
    request, tell, whole = run.request, run.tell, run.program
    sliced = _slice(decided, after)
    backend = request.backend.with_data(run.data).with_source(run.opened.source)
    small = backend.storable(owning(sliced.run.program, whole) if run.opened.given else sliced.run.program)
    report, extras = _describe(decided, sliced, small)
    timed = describe_latency(run, decided.budget, decided.latency)
    if timed is not None and decided.latency.table is not None:
        report["latency"], extras[FILE] = timed, decided.latency.table.to_json().encode()
    report["options"] = plain(request.options)
    artifact = Artifact(small, sliced.plan, report, backend, extras=extras)
    if request.out is not None and ranks.rank() == 0:
        tell.stage(f"lower to {request.target}, verify and save")
        with silence():
            artifact.save(Path(request.out), measure=time_delivered(decided), page=request.page)
        for missing in (artifact.report["unfinished"] or {}).get("missing", ()):
            tell.warn(f"not finished: {missing}")
    return artifact


def _slice(decided: Decided, after: Sequence[Pass]) -> Sliced:
    """The plan carried out. Raises InternalError where slicing is not masking, or costs what was not predicted."""
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.fold_indices import FoldIndices
    from ..passes.transform.fuse_norms import FuseNorms
    from ..passes.transform.merge_tokens import MergeTokens, without_tokens
    from ..passes.transform.slice_axes import SliceAxes
    from ..passes.transform.spell_out_tokens import SpellOutTokens

    run = decided.run
    plan, dense = run.program.need("plan"), CostModel(run.program)()
    if plan.tokens is not None and not plan.tokens.empty:
        found = run.through(MergeTokens(), PropagateAxes(), *run.finders)
        run = found.on(found.program.in_bases_of(run.program).but(plan=without_tokens(plan)))
        run.program.need("plan").check(run.program.group_by_name)
    reduced = run.program
    predicted = CostModel(reduced)(count_kept(reduced))
    run = carry_out_parts(run).through(SliceAxes())
    cut = run.program
    run.tell.stage("compare slicing with masking")
    masked = compare_with_masking(run, reduced)
    fuse = [FuseNorms()] if FuseNorms.applies(cut) else []
    run = run.on(cut.without_facts()).through(FoldIndices(), SpellOutTokens(), *fuse)
    run, counted = _count_cost(run)
    # what only a branch needs goes with it: its norm; of attention without values the queries and keys
    gone = any(not choice.keep for choice in plan.elements.values())
    fewer = gone and counted.flops <= predicted.flops and counted.params <= predicted.params
    if (counted.flops, counted.params) != (predicted.flops, predicted.params) and not fewer:
        raise InternalError(f"the plan was to cost {predicted}, the result costs {counted}", pipeline=run.pipeline)
    for one in after:
        run, counted = _count_cost(run.through(one))
    zeroed = None
    if run.request.tiles is not None or decided.tiles or plan.blocks:
        zeroed = zero_tiles(run, decided, dense, counted)
        run, plan = zeroed.run, zeroed.plan
    return Sliced(run, reduced, cut, plan, counted, masked, zeroed)


def _count_cost(run: Run) -> tuple[Run, Cost]:
    """(the run with its program as it is, what that costs)."""
    from ..passes.analysis.propagate_axes import PropagateAxes

    known = run.through(PropagateAxes())
    check_counts(known.program, known.pipeline)
    return known.on(run.program), CostModel(known.program)()


def time_delivered(decided: Decided) -> DeliveredLatency:
    """What times the result beside the dense program, once it is written."""
    run = decided.run
    by = str(run.request.options.get("command", "compile"))
    return DeliveredLatency(run.request.latency, by, lowerable(decided.unfitted), run.clock.made, run.tell)


def _describe(decided: Decided, sliced: Sliced, small: Program) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(the report as far as it is known before lowering, more files for the artefact by name).

    small   the result
    """
    run, request, plan = decided.run, decided.run.request, sliced.plan
    whole, data, amount = run.program, run.data, run.opened.amount
    tiles = None if request.tiles is None else request.tiles.budget  # of the whole: slicing goes a part of the way
    agreement = _agreement(decided, sliced, small)
    if agreement is not None:
        tell_of_lost_answers(decided, agreement)
    report = build_report(
        small,
        name=run.opened.name,
        target=request.backend.name,
        dense=CostModel(whole)(),
        compressed=sliced.counted,
        plan=plan,
        frozen=frozen_entries(whole.need("groups"), whole.tokens),
        gaps=op_gaps(whole.need("groups"), [g for g, c in plan.elements.items() if len(c.keep) < c.size]),
        budget=tiles or decided.budget,
        pipeline=sliced.run.pipeline,
        passes=sliced.run.results,
        seed=run.seed,
        notes=list(dict.fromkeys([*run.tell.notes, *small.notes])),
        masked={"max_rel": sliced.masked.max_rel, "tolerance": sliced.masked.tolerance},
        proof=[link.to_dict() for link in (*whole.proof, sliced.masked)],
        importance=plan.about.get("criterion"),
        data=None
        if data is None
        else {
            "origin": data.origin,
            "samples": data.samples,
            "labelled": data.labelled,
            "generated": data.generated,
            **({"held_out": run.opened.share} if run.opened.share else {}),
            **({"amount": amount.why} if amount is not None and amount.why else {}),
        },
    )
    report["search"] = {key: plan.about[key] for key in ("method", "head_scale", "rounds") if key in plan.about}
    kinds = {str(k) for k in plan.about.get("kinds") or plan.kinds}
    report["groups"] = [
        *group_entries(whole, plan, decided.unfitted.scores, kinds),
        *([] if whole.tokens is None else token_entries(whole, plan)),
        *([] if sliced.zeroed is None else sliced.zeroed.entries),
    ]
    report["memory"] = {"dense": footprint(whole), "compressed": footprint(small), "counted": COUNTED}
    if agreement is not None:
        report["agreement"] = agreement
    if decided.recovery is not None:
        report["recovery"] = decided.recovery
    if sliced.zeroed is not None:
        report["sparsity"] = sliced.zeroed.told
    extras = {}
    if whole.tokens is not None:
        told = describe_tokens(whole.tokens, plan.tokens)
        report["tokens"] = {key: value for key, value in told.items() if key != "sites"}
        picture = _picture(run, whole.tokens, sliced.reduced)
        if picture is not None:
            extras[PICTURE], report["tokens"]["picture"] = picture, PICTURE
    return report, extras


def _agreement(decided: Decided, sliced: Sliced, small: Program) -> dict[str, Any] | None:
    """The outputs after every step that changes them, against the dense ones. None without data of the user's.

    Samples are those of the data that nothing was decided or fitted on, where there are any. Else what was fitted is
    judged by fits to other samples (``cross_fitted``), where recovery made some.
    """

    run, dense = decided.run, decided.unfitted
    data = run.opened.held or run.data
    if data is None or data.generated:
        return None
    run.tell.stage("compare with the dense model")
    with silence():
        judge = AgreementEvaluator(dense, few(dense, data))
        steps: list[tuple[str, Program]] = []
        tokens = dense.plan is not None and dense.plan.tokens is not None and not dense.plan.tokens.empty
        unfitted = dense
        if decided.recovery is not None or tokens:
            unfitted = reduce_tokens(dense, run.finders)
            if tokens:
                steps.append(("tokens reduced", unfitted))
        if decided.recovery is not None and unfitted.need("plan").elements:
            steps.append(("sliced, weights as they were", carry_out(unfitted)))
        fitted = "sliced" if decided.recovery is None else f"recovered ({decided.recovery['method']})"
        if sliced.zeroed is not None:
            steps += [(fitted, sliced.cut), ("zeros in weights", small)]
        else:
            steps.append((fitted, small))
        found = [{"after": name, **judge.of(program)} for name, program in steps]
    held = run.opened.held is not None
    crossed = None if held or sliced.zeroed is not None else _cross_fitted(decided.recovery)
    return {
        "samples": judge.samples,
        "held_out": held,
        "origin": data.origin,
        "dense_accuracy": judge.accuracy,
        "chance": judge.chance,
        "steps": found,
        **({} if crossed is None else {"cross_fitted": crossed}),
    }


def _cross_fitted(recovery: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The chosen recovery on samples that its fits had not seen, as the guard judged it; None where none did."""
    judged = ((recovery or {}).get("guard") or {}).get((recovery or {}).get("chosen"))
    if not judged or recovery is None:
        return None
    names = {"top1": "answers", "kl": "kl", "cosine": "cosine"}
    figures = {name: judged[key] for name, key in names.items() if key in judged}
    return {"samples": recovery["held_out"], "folds": recovery["folds"], **figures}


def _picture(run: Run, flow: TokenFlow, reduced: Program) -> bytes | None:
    """Which patches merged into which, of a few inputs: the data's, else the example's."""
    from ..report.token_picture import token_picture

    if run.data is None:
        flat = reduced.flatten(*reduced.example_inputs)
    else:
        flat = reduced.flatten(run.data.batches[0].args, run.data.batches[0].kwargs)
    return token_picture(flow, reduced, flat)
