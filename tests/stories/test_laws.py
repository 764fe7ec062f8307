"""Every law on every tiny model of the zoo, at 0.75, 0.5 and 0.25 of the MACs where the axes allow it."""

from __future__ import annotations

import pytest
import torch
from support import drawing, zoo
from support.laws import (
    ALL_KINDS,
    analysed,
    budget_is_met,
    calling_twice_is_calling_once,
    cost_is_counted,
    empty_plan_is_identity,
    infeasible_says_why,
    layers_go_entirely,
    leaves_end_somewhere,
    norms_fuse,
    plan_fits_another_checkpoint,
    random_plan,
    rewritten_in_order,
    rotated,
    rotation_is_exact,
    saving_keeps_the_output,
    searched,
    shapes_are_predicted,
    sliced,
    sliced_equals_masked,
    tails_are_removed_at_once,
)

from fxprune.errors import BudgetInfeasible, NothingToPrune
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.group import LAYERS, Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.align_heads import AlignHeads
from fxprune.passes.transform.fuse_norms import FuseNorms


@zoo.part("laws")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_laws(name: str) -> None:
    program = analysed(name)
    leaves_end_somewhere(program)
    shapes_are_predicted(program)
    empty_plan_is_identity(program)
    before = 1.0
    for ratio in drawing.of((0.75, 0.25), (0.75, 0.5, 0.25)):
        budget = Budget("flops", ratio)
        try:
            planned = searched(program, budget, seed=int(100 * ratio))
        except BudgetInfeasible as error:
            infeasible_says_why(error)
            continue
        plan = planned.need("plan")
        budget_is_met(program, budget, planned)
        result = sliced(program, plan)
        sliced_equals_masked(program, plan, result)
        cost_is_counted(program, plan, result)
        cost = (
            CostModel(program)(
                {g.axis: len(plan.choices[g.name].keep) for g in program.need("groups") if g.name in plan.choices}
            ).flops
            / CostModel(program)().flops
        )
        assert cost <= before
        before = cost
    result = sliced(program, random_plan(program, ALL_KINDS, 0.5, seed=1))
    saving_keeps_the_output(result)
    calling_twice_is_calling_once(result)


def test_every_model_is_in_the_part_of_some_test() -> None:
    seen = set[str]()
    for test in zoo.PARTS:
        mark = zoo.part(test).mark
        seen |= set(drawing.draw("", list(zoo.MODELS), mark.args[0], mark.kwargs["first"]))
    assert seen == zoo.MODELS.keys()


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("share", [0.7, 0.3])
def test_any_axis_may_be_cut(name: str, share: float) -> None:
    """Query/key width, value width and residual width as well, all at once, at random."""
    program = analysed(name)
    plan = random_plan(program, ALL_KINDS, share, seed=int(10 * share))
    sliced_equals_masked(program, plan, sliced(program, plan))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "swin", "resnet18", "t5_encoder", "gpt2", "convnext"])
def test_a_plan_fits_another_checkpoint(name: str) -> None:
    program = analysed(name)
    plan = random_plan(program, ALL_KINDS, 0.5, seed=3)
    plan_fits_another_checkpoint(program, plan, analysed(name, seed=1))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", ["vit", "beit", "swin", "deit_distilled", "hf_vit", "multihead_vit"])
def test_unfused_qkv_comes_apart(name: str) -> None:
    program = analysed(name, unfuse=True)
    fused = [g for g in analysed(name).need("groups") if g.kind == Kind.QKV and g.prunable]
    live = {k: [g for g in program.need("groups") if g.kind == k and g.prunable] for k in (Kind.QK, Kind.V, Kind.QKV)}
    assert len(live[Kind.QK]) == len(live[Kind.V]) == (len(fused) or 2)  # separate projections were never fused
    assert not live[Kind.QKV]
    plan = random_plan(program, ALL_KINDS, 0.5, seed=2)
    sliced_equals_masked(program, plan, sliced(program, plan))


ROTATED = ["multihead_vit", "vit", "deit_distilled", "deit3", "dinov2", "beit", "eva02", "cait", "maxvit"]
ROTATED += ["electra", "gpt2", "opt", "llama", "qwen2", "mistral", "hf_vit"]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_width_is_cut_exactly(name: str) -> None:
    """In its principal basis a stream's width may be cut alone, and with all else."""
    program = analysed(name)
    turned = rotated(program)
    rotation_is_exact(program, turned)
    shapes_are_predicted(turned)
    leaves_end_somewhere(turned)
    for kinds, share in (((Kind.WIDTH,), 0.5), (ALL_KINDS, 0.4)):
        plan = random_plan(turned, kinds, share, seed=5)
        result = sliced(turned, plan)
        sliced_equals_masked(turned, plan, result)
        cost_is_counted(turned, plan, result)
        norms_fuse(result)
    saving_keeps_the_output(FuseNorms().run(result))


@pytest.mark.parametrize("name", ["vit", "bert", "t5_encoder", "gpt2", "llama", "swin"])
def test_what_goes_from_the_end_is_measured_as_a_whole(name: str) -> None:
    tails_are_removed_at_once(analysed(name, unfuse=True), (Kind.QK, Kind.V))


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_heads_in_order_compute_the_same(name: str) -> None:
    program = analysed(name, unfuse=True)
    after, (result,) = Pipeline((AlignHeads(),), start=("axes", "groups")).apply(program)
    widths = [g.name for g in program.need("groups") if g.kind in (Kind.QK, Kind.V, Kind.QKV) and g.prunable]
    assert sorted({*result.record.strengths, *result.record.stays}) == sorted(widths)
    rewritten_in_order(program, after)


LAYERED = [
    "vit",
    "deit3",
    "dinov2",
    "cait",
    "swin",
    "pvt_v2",
    "mobilevit",
    "bert",
    "distilbert",
    "electra",
    "deberta_v2",
]
LAYERED += [
    "gpt2",
    "opt",
    "llama",
    "qwen2",
    "modernbert",
    "t5_encoder",
    "hf_swin",
    "segformer",
    "whisper_encoder",
    "clip",
]


@pytest.mark.drawn(4)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", LAYERED)
def test_layers_go_entirely(name: str, kind: Kind) -> None:
    saving_keeps_the_output(layers_go_entirely(analysed(name), kind))


def test_nothing_to_prune_is_an_error() -> None:
    program = capture(torch.nn.Linear(8, 4), (torch.randn(2, 8),))
    program = Pipeline((PropagateAxes(), FindGroups())).run(program)
    with pytest.raises(NothingToPrune, match=r"graph (in|out)put"):
        searched(program, Budget("flops", 0.5))
