"""The last stage of a run: slice, prove that slicing equals masking, report, lower, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact.artifact import Artifact, build_report
from ..artifact.delivered import Stopwatch
from ..errors import InternalError, VerifyError
from ..ir.cost import Cost, CostModel
from ..ir.flops import check_counts
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..ir.rebuild import owning
from ..ir.token_flow import TokenFlow, describe_tokens
from ..process import ranks
from ..process.silence import silence
from ..report.scores import group_entries
from ..request.latency import FILE
from ..request.options import plain
from ..target.footprint import COUNTED, footprint
from .decide_latency import told
from .decide_tiles import sparsified
from .judge import Judge, few
from .measure_latency import lowerable
from .run import Work, kept_counts

PICTURE = "tokens.png"


def finish(work: Work, program: Program, after: Sequence[Pass] = ()) -> Artifact:
    """Slice, prove that slicing equals masking, report, and lower and save where ``out`` says.

    after   passes that were asked for behind slicing
    """
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.fold_indices import FoldIndices
    from ..passes.transform.merge_tokens import MergeTokens, without_tokens
    from ..passes.transform.slice_axes import SliceAxes
    from ..passes.transform.spell_out_tokens import SpellOutTokens

    whole, plan, model = program, program.need("plan"), CostModel(program)
    if plan.tokens is not None and not plan.tokens.empty:
        program = work.run(program, MergeTokens(), PropagateAxes(), work.find_groups).but(plan=without_tokens(plan))
        program.need("plan").check(program.group_by_name)
    predicted = CostModel(program)(kept_counts(program))
    sliced = work.run(program, SliceAxes())
    work.stage("compare slicing with masking")
    masked = _compare(work, program, sliced)
    small = work.run(sliced.without_facts(), FoldIndices(), SpellOutTokens())
    analysed = work.run(small, PropagateAxes())
    check_counts(analysed, work.pipeline)
    counted = CostModel(analysed)()
    if (counted.flops, counted.params) != (predicted.flops, predicted.params):
        raise InternalError(f"the plan was to cost {predicted}, the result costs {counted}", pipeline=work.pipeline)
    for one in after:
        small = work.run(small, one)
        counted = CostModel(work.run(small, PropagateAxes()))()
    sparsity = None
    if work.blocks is not None or work.tiles or plan.blocks:
        small, plan, sparsity = sparsified(work, small, plan, model(), counted)
    if work.given:
        small = owning(small, whole)
    report, extras = described(work, whole, program, sliced, small, plan, counted, masked, sparsity)
    timed = told(work, whole)
    if timed is not None and work.timing.table is not None:
        report["latency"], extras[FILE] = timed, work.timing.table.to_json().encode()
    report["options"] = plain(work.options)
    artifact = Artifact(small, plan, report, work.backend.with_data(work.calibration), extras=extras)
    if work.out is not None and ranks.rank() == 0:
        work.stage(f"lower to {work.target}, verify and save")
        with silence():
            artifact.save(Path(work.out), measure=stopwatch(work, whole))
        for missing in (artifact.report["unfinished"] or {}).get("missing", ()):
            work.warn(f"not finished: {missing}")
    return artifact


def stopwatch(work: Work, whole: Program) -> Stopwatch:
    """What times the result beside the dense program, once it is written."""
    by = str(work.options.get("command", "compile"))
    return Stopwatch(work.timing.wish, by, lowerable(work.decided or whole), work.timing.clock, work.on_event)


def _compare(work: Work, program: Program, sliced: Program) -> dict[str, float]:
    """Largest relative difference between the sliced graph and the dense one with the same elements masked.

    Raises InternalError beyond the tolerance of the coarsest dtype: slicing is then wrong, and nothing is written.
    VerifyError where the model draws random numbers, so that nothing can be said.
    """
    from ..target.parity import tolerance_of, why_random
    from ..testing import masking_error

    with silence():
        limit = tolerance_of(program)
        error = masking_error(program, sliced, work.seed, limit)
    if not error <= limit:
        why, cure = why_random(program)
        if why:
            raise VerifyError("slicing cannot be compared with masking", where=work.name, why=why, cure=cure)
        raise InternalError(
            f"slicing differs from masking by {error:.1e} (relative, tolerance {limit:.0e})", pipeline=work.pipeline
        )
    return {"max_rel": error, "tolerance": limit}


def described(
    work: Work,
    whole: Program,
    reduced: Program,
    sliced: Program,
    small: Program,
    plan: CompressionPlan,
    counted: Cost,
    masked: Mapping[str, float],
    sparsity: dict[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(the report as far as it is known before lowering, more files for the artefact by name).

    whole     the dense program as it was cut: recovered weights, groups and plan;  reduced: the same with its tokens
              reduced;  sliced: what slicing left of that;  small: the result;  counted: what it costs
    masked    how exact slicing was;  sparsity: what is known of zeros in weights
    """
    calibration, decided = work.calibration, work.decided or whole
    tiles = None if work.blocks is None else work.blocks.budget  # of the whole: slicing goes a part of the way
    report = build_report(
        small,
        name=work.name,
        target=work.backend.name,
        dense=CostModel(whole)(),
        compressed=counted,
        plan=plan,
        groups=whole.need("groups"),
        budget=tiles or work.budget,
        pipeline=work.pipeline,
        passes=work.results,
        seed=work.seed,
        notes=list(dict.fromkeys([*work.notes, *small.notes])),
        masked=dict(masked),
        importance=plan.about.get("criterion"),
        data=None
        if calibration is None
        else {
            "origin": calibration.origin,
            "samples": calibration.samples,
            "labelled": calibration.labelled,
            "generated": calibration.generated,
            **({"held_out": work.held_back} if work.held_back else {}),
        },
    )
    kept = {name: len(choice.keep) for name, choice in plan.choices.items()}
    report["search"] = {key: plan.about[key] for key in ("method", "head_scale", "rounds") if key in plan.about}
    kinds = {str(k) for k in plan.about.get("kinds") or [c.kind for c in plan.choices.values()]}
    report["groups"] = group_entries(whole, kept, decided.scores, kinds)
    report["memory"] = {"dense": footprint(whole), "compressed": footprint(small), "counted": COUNTED}
    agreement = _agreement(work, decided, sliced, small, zeros=sparsity is not None)
    if agreement is not None:
        report["agreement"] = agreement
    if work.recovery is not None:
        report["recovery"] = work.recovery
    if sparsity is not None:
        report["sparsity"] = sparsity
    extras = {}
    if whole.tokens is not None:
        report["tokens"] = describe_tokens(whole.tokens, plan.tokens)
        picture = _picture(work, whole.tokens, reduced)
        if picture is not None:
            extras[PICTURE], report["tokens"]["picture"] = picture, PICTURE
    return report, extras


def _agreement(work: Work, decided: Program, sliced: Program, small: Program, zeros: bool) -> dict[str, Any] | None:
    """The outputs after every step that changes them, against the dense ones. None without data of the user's.

    Samples are those of the data that nothing was decided or fitted on, where it holds more than were asked for.
    """
    from ..passes.transform.slice_axes import SliceAxes

    data = work.held or work.calibration
    if data is None or data.generated:
        return None
    work.stage("compare with the dense model")
    with silence():
        judge = Judge(decided, few(decided, data))
        steps: list[tuple[str, Program]] = []
        tokens = decided.plan is not None and decided.plan.tokens is not None and not decided.plan.tokens.empty
        unfitted = decided
        if work.recovery is not None or tokens:
            unfitted = work.reduced(decided)
            if tokens:
                steps.append(("tokens reduced", unfitted))
        if work.recovery is not None and unfitted.need("plan").choices:
            steps.append(("sliced, weights as they were", SliceAxes().run(unfitted)))
        fitted = "sliced" if work.recovery is None else f"recovered ({work.recovery['method']})"
        if zeros:
            steps += [(fitted, sliced), ("zeros in weights", small)]
        else:
            steps.append((fitted, small))
        found = [{"after": name, **judge.of(program)} for name, program in steps]
    return {
        "samples": judge.samples,
        "held_out": work.held is not None,
        "origin": data.origin,
        "dense_accuracy": judge.accuracy,
        "steps": found,
    }


def _picture(work: Work, flow: TokenFlow, reduced: Program) -> bytes | None:
    """Which patches merged into which, of a few inputs: the data's, else the example's."""
    from ..report.token_picture import token_picture

    if work.calibration is None:
        flat = reduced.flatten(*reduced.example_inputs)
    else:
        flat = reduced.flatten(work.calibration.batches[0].args, work.calibration.batches[0].kwargs)
    return token_picture(flow, reduced, flat)
