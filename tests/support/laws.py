"""The laws that every model, pass and backend keeps. Each is a function that raises AssertionError when broken.

A new pass or backend joins by one line in the parameter lists of ``test_laws.py``.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxprune.data.batch import Batch, Calibration
from fxprune.errors import BudgetInfeasible
from fxprune.intake.capture import capture
from fxprune.ir.axis import leaves, real_size, total
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.flops import check_counts
from fxprune.ir.group import DEFAULT_KINDS, Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.consumers import consumers
from fxprune.passes.analysis.importance.distance import Measure
from fxprune.passes.analysis.importance.exact import Removals
from fxprune.passes.analysis.importance.features import find_taps, views
from fxprune.passes.analysis.importance.trajectory import Trajectory
from fxprune.passes.analysis.measure_rungs import MeasureRungs, find_tailed
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.fold_indices import FoldIndices
from fxprune.passes.transform.fold_weights import FoldWeights
from fxprune.passes.transform.fuse_norms import FuseNorms
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.rotate_width import RotateWidth
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.passes.transform.unfuse import Unfuse
from fxprune.passes.transform.unshare import Unshare
from fxprune.process.silence import quiet
from fxprune.testing import masked_run, relative_error, run_flat
from support import brute, zoo

TOLERANCE = 1e-4  # relative, fp32
ALL_KINDS = tuple(Kind)
Flat = list[Any]


@functools.cache
def analysed(name: str, seed: int = 0, unfuse: bool = False) -> Program:
    """A zoo model, captured, cleaned, with axes and groups."""
    module, args, kwargs = zoo.build(name, seed)
    return analysed_of(module, args, kwargs, unfuse, name)


def analysed_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, unfuse: bool = False, name: str = ""
) -> Program:
    """The same for any module."""
    prepare = (Clean(), Inline(), FoldWeights(), *([Unfuse()] if unfuse else []))
    before = (*prepare, PropagateAxes(), FindGroups(), Unshare())
    program = Pipeline(before).run(capture(module, args, kwargs or {}, name=name or type(module).__name__))
    return Pipeline((PropagateAxes(), FindGroups())).run(program)


def rotated(program: Program) -> Program:
    """The program with its streams in the bases that its example inputs give, analysed again."""
    args, kwargs = program.example_inputs
    data = Calibration((Batch(tuple(args), kwargs),), "the example")
    return Pipeline((RotateWidth(data=data), PropagateAxes(), FindGroups()), start=("axes", "groups")).run(program)


def inputs(program: Program, batch: int) -> Flat:
    """User inputs of the captured kind; another batch size and length where the graph leaves them open."""
    args, kwargs = program.example_inputs
    fixed = any("batch size fixed" in note for note in program.notes)
    length = None if fixed or any("sequence length fixed" in note for note in program.notes) else 9 - batch
    return program.flatten(*zoo.other_inputs(args, kwargs, 2 if fixed else batch, length))


def random_plan(program: Program, kinds: Sequence[Kind], share: float, seed: int) -> CompressionPlan:
    """Random elements of every prunable group of ``kinds``."""
    generator = torch.Generator().manual_seed(seed)
    choices = {}
    for group in program.need("groups"):
        if group.prunable and group.kind in kinds:
            count = max(1, round(group.size * share))
            keep = torch.randperm(group.size, generator=generator)[:count].sort().values
            choices[group.name] = Choice(str(group.kind), group.size, tuple(keep.tolist()))
    return CompressionPlan(choices)


def sliced(program: Program, plan: CompressionPlan) -> Program:
    passes = (SliceAxes(), FoldIndices())
    return Pipeline(passes, start=("axes", "groups", "plan")).run(program.but(plan=plan))


def searched(program: Program, budget: Budget, seed: int = 0, kinds: Sequence[Kind] = DEFAULT_KINDS) -> Program:
    """The program with a plan within ``budget`` from random scores. Raises BudgetInfeasible."""
    passes = (ScoreGroups(criterion="random", seed=seed), SearchPlan(budget, kinds=tuple(kinds)))
    return Pipeline(passes, start=("axes", "groups")).run(program)


# ---------------------------------------------------------------- the laws


def sliced_equals_masked(program: Program, plan: CompressionPlan, result: Program) -> None:
    """The sliced graph computes what the dense one computes with the removed elements masked, at two batch sizes."""
    for batch in (2, 3):
        flat = inputs(program, batch)
        dense, want, got = run_flat(program, flat), masked_run(program, plan, flat), run_flat(result, flat)
        assert relative_error(got, want) <= TOLERANCE
        if not plan.empty:
            assert relative_error(dense, want) > 10 * TOLERANCE, "the plan changed nothing: the law would be vacuous"


def rotation_is_exact(program: Program, turned: Program) -> None:
    """The same function, of which every rotated width can be cut exactly; nothing is left to rotate."""
    for batch in (2, 3):
        flat = inputs(program, batch)
        assert relative_error(run_flat(turned, flat), run_flat(program, flat)) <= 1e-5
    streams = [g for g in turned.need("groups") if g.ordered]
    assert streams
    for group in streams:
        assert (group.kind, group.exact, group.frozen) == (Kind.WIDTH, True, ""), group
    assert rotated(turned).exported is turned.exported


def norms_fuse(result: Program) -> None:
    """Norms over a width that is a number become one op each, of the same value."""
    fused = FuseNorms().run(result)
    assert FuseNorms.applies(result)
    assert not FuseNorms.applies(fused)
    for batch in (2, 3):
        flat = inputs(result, batch)
        assert relative_error(run_flat(fused, flat), run_flat(result, flat)) <= 1e-5


def counted_macs(program: Program) -> float:
    """MACs of one sample at the example's other sizes, counted by torch while the graph runs.

    From two batch sizes where the batch is open, as the slope: a part that does not depend on the batch (a bias
    network, a second tower's constants) counts once.
    """

    def macs(batch: int) -> float:
        args, kwargs = program.example_inputs
        flat = program.flatten(*zoo.other_inputs(args, kwargs, batch))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run_flat(program, flat)
        return counter.get_total_flops() / 2

    fixed = any("batch size fixed" in note for note in program.notes)
    return macs(2) if fixed else macs(1)


def cost_is_counted(program: Program, plan: CompressionPlan, result: Program) -> None:
    """Predicted cost = cost of the re-analysed result = what torch counts when it runs, node by node and as a whole."""
    check_counts(program)
    model = CostModel(program)
    kept = plan.sizes(program.need("groups"))
    predicted = model(kept)
    again = CostModel(Pipeline((PropagateAxes(), FindGroups())).run(result))()
    assert (predicted.flops, predicted.params) == (again.flops, again.params)
    assert abs(counted_macs(result) - predicted.flops) <= 1e-6 * predicted.flops


def budget_is_met(program: Program, budget: Budget, planned: Program) -> None:
    """Never above; within 2 % of the dense cost below, or no aligned element would still fit."""
    model, plan = CostModel(program), planned.need("plan")
    dense, limit = model().metric(budget.metric), budget.limit(model())
    counts = plan.sizes(program.need("groups"))
    cost = model(counts).metric(budget.metric)
    assert cost <= limit
    if limit - cost <= 0.02 * dense:
        return
    for group in program.need("groups"):
        if group.name in plan.choices:
            bigger = [n for n in group.levels() if n > counts[group.axis]]
            assert not bigger or model({**counts, group.axis: bigger[0]}).metric(budget.metric) > limit, group.name


def infeasible_says_why(error: BudgetInfeasible) -> None:
    assert "reach" in str(error)
    assert error.why
    assert error.cure


def tails_are_removed_at_once(program: Program, kinds: Sequence[Kind]) -> None:
    """Of every group of ``kinds``: a tail of one element is that element's removal, a tail of several is what the model
    does with all of them masked, and the curve that is made of them rises."""
    args, kwargs = program.example_inputs
    data = Calibration((Batch(args, kwargs),), "example")
    scored = ScoreGroups(Trajectory(probes=1, check=0), data).run(program)
    groups = [g for g in find_tailed(scored, kinds) if g.exact]
    assert groups
    removals, taps = Removals(program, data.batches, Measure(), 2**28), find_taps(program)
    seen = views(consumers(program), taps, "later")
    dense, _ = brute.watch(program, data.batches[0], taps)
    for group in groups:
        tail = torch.arange(group.size // 2, group.size)
        (some, _), (one, _) = (
            removals.together("law", {group: [tail, tail[-1:]]}),
            removals("law", {group: tail[-1:]}),
        )
        assert float(some[group.name][1]) == float(one[group.name][0])
        now, _ = brute.watch(program, data.batches[0], taps, group, *tail.tolist())
        scale = removals._batch(0).entries
        want = scale * brute.features_moved(taps, seen[group.name], now, dense)
        assert float(some[group.name][0]) == pytest.approx(want, rel=1e-3, abs=1e-5 * scale)
    measured = MeasureRungs(Trajectory(probes=1, check=0), kinds=tuple(kinds), data=data).run(scored).need("scores")
    for group in groups:
        curve = measured[group.name].curve
        assert curve is not None
        assert float(curve[0]) == 0.0
        assert bool((curve[1:] >= curve[:-1]).all())


def saving_keeps_the_output(result: Program) -> None:
    """Save and load give the same output, bit for bit."""
    buffer = io.BytesIO()
    torch.export.save(result.exported, buffer)
    buffer.seek(0)
    with quiet():  # torch 2.11 warns of its own buffers
        back = Program(torch.export.load(buffer))
    flat = inputs(result, 2)
    for a, b in zip(run_flat(result, flat), run_flat(back, flat), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


def calling_twice_is_calling_once(result: Program) -> None:
    flat = inputs(result, 2)
    for a, b in zip(run_flat(result, flat), run_flat(result, flat), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


def empty_plan_is_identity(program: Program) -> None:
    result = sliced(program, CompressionPlan({}))
    flat = inputs(program, 2)
    for a, b in zip(run_flat(program, flat), run_flat(result, flat), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


def leaves_end_somewhere(program: Program) -> None:
    """Every prunable leaf is summed over or averaged; every other group says why it is frozen."""
    axes = program.need("axes")
    ended = {a for c in (*axes.contractions, *axes.statistics) for a in leaves(c.dim)}
    for group in program.need("groups"):
        assert group.frozen or group.axis in ended, group.name


def shapes_are_predicted(program: Program) -> None:
    """The axes of every tensor multiply to its size in the example, and no rule failed on the way."""
    axes = program.need("axes")
    assert axes.failed == ()
    for node in program.graph.nodes:
        dims, value = axes.dims.get(node.name), node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(dims, list):
            for dim, size in zip(dims, value.shape, strict=True):
                assert real_size(total(dim), axes.sizes) == axes.stand_ins.real(size), node.name


def rewritten_in_order(program: Program, after: Program) -> None:
    """Weights in another basis: the same outputs and graph, and sliced still equals masked, the facts handed on."""
    assert str(after.graph) == str(program.graph)
    for batch in (2, 3):
        flat = inputs(program, batch)
        assert relative_error(run_flat(after, flat), run_flat(program, flat)) <= 1e-5
    names = [g.name for g in after.need("groups") if g.ordered]
    assert [g.but(ordered=False, basis="") for g in after.need("groups")] == list(program.need("groups"))
    keep = {g.name: Choice(str(g.kind), g.size, tuple(range(-(-g.size // 2))), g.basis) for g in after.need("groups")}
    plan = CompressionPlan({name: keep[name] for name in names})
    if names:
        sliced_equals_masked(after, plan, sliced(after, plan))


def plan_fits_another_checkpoint(program: Program, plan: CompressionPlan, other: Program) -> None:
    """Through JSON and onto other weights of the same architecture: the same shapes, and still sliced = masked."""
    again = replace(CompressionPlan.from_json(plan.to_json()), source=None)  # drawn without regard to multiples
    assert again.choices == plan.choices
    one, two = sliced(program, plan), sliced(other, again)
    assert {k: v.shape for k, v in one.tensors.items()} == {k: v.shape for k, v in two.tensors.items()}
    sliced_equals_masked(other, again, two)
