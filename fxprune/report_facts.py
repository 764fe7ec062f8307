"""What a run knows about its result, as plain data for ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .artifact import build_report
from .cost import Cost, CostModel
from .footprint import COUNTED, footprint
from .outcome import Judge, few
from .plan import CompressionPlan
from .program import Program
from .report_scores import group_entries
from .tokens import TokenFlow, describe_tokens

if TYPE_CHECKING:
    from .work import Work

PICTURE = "tokens.png"


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
    from .passes.transform.slice_axes import SliceAxes
    from .work import silence

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
    from .token_picture import token_picture

    if work.calibration is None:
        flat = reduced.flatten(*reduced.example_inputs)
    else:
        flat = reduced.flatten(work.calibration.batches[0].args, work.calibration.batches[0].kwargs)
    return token_picture(flow, reduced, flat)
