"""Slicing: weights, literals, shapes, whole branches, and plans that do not fit."""

from __future__ import annotations

import pytest
import torch
from support.laws import ALL_KINDS, analysed, inputs, random_plan, sliced
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import InternalError, PlanError
from fxprune.intake.capture import capture
from fxprune.ir.axes import Literal
from fxprune.ir.cost import CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.testing import masked_run, relative_error, run_flat


class Block(nn.Module):
    """Pre-LN attention and FFN, biases everywhere."""

    def __init__(self, width: int = 16, heads: int = 4, hidden: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attention.transpose(1, 2).reshape(b, t, w))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def block(allow_empty: bool = False) -> Program:
    torch.manual_seed(0)
    passes = (Clean(), PropagateAxes(), FindGroups(align=1, allow_empty=allow_empty))
    return Pipeline(passes).run(capture(Block(), (torch.randn(2, 6, 16),)))


def plan(program: Program, **keep: tuple[int, ...]) -> CompressionPlan:
    groups = {str(g.kind): g for g in program.need("groups") if g.prunable}
    return CompressionPlan({groups[k].name: Choice(k, groups[k].size, v) for k, v in keep.items()})


def cut(program: Program, chosen: CompressionPlan) -> Program:
    return Pipeline((SliceAxes(),), start=("axes", "groups", "plan")).run(program.but(plan=chosen))


def agree(program: Program, chosen: CompressionPlan, result: Program) -> None:
    flat = [torch.randn(3, 6, 16)]
    torch.testing.assert_close(run_flat(result, flat), masked_run(program, chosen, flat), rtol=1e-4, atol=1e-5)


def test_weights_hold_exactly_what_was_kept() -> None:
    program = block()
    result = cut(program, plan(program, ffn=(0, 3, 31), head=(1, 2)))
    dense, small = program.tensors, result.tensors
    assert torch.equal(small["fc1.weight"], dense["fc1.weight"][[0, 3, 31]])
    assert torch.equal(small["fc2.weight"], dense["fc2.weight"][:, [0, 3, 31]])
    rows = [16 * third + 4 * head + d for third in range(3) for head in (1, 2) for d in range(4)]
    assert torch.equal(small["qkv.weight"], dense["qkv.weight"][rows])
    assert torch.equal(small["proj.bias"], dense["proj.bias"])
    assert isinstance(small["fc1.weight"], nn.Parameter)


def test_the_program_given_stays_as_it_was() -> None:
    program = block()
    text, shapes = str(program.graph), {k: v.shape for k, v in program.tensors.items()}
    cut(program, plan(program, ffn=(0,), head=(0,)))
    assert str(program.graph) == text
    assert {k: v.shape for k, v in program.tensors.items()} == shapes


def test_facts_are_dropped() -> None:
    program = block()
    result = cut(program, plan(program, ffn=(0, 1)))
    assert (result.axes, result.groups, result.plan) == (None, None, None)


def test_attention_keeps_its_dense_scale() -> None:
    """Cutting query/key width must not change the temperature: E ** -0.5 of the dense width is written out."""
    program = block()
    result = cut(program, plan(program, qkv=(0, 2)))
    node = next(n for n in result.graph.nodes if "scaled_dot" in str(n.target))
    assert node.kwargs["scale"] == pytest.approx(4**-0.5)
    agree(program, plan(program, qkv=(0, 2)), result)


@pytest.mark.parametrize("keep", [{"head": ()}, {"ffn": ()}, {"head": (), "ffn": ()}, {"head": (), "ffn": (4,)}])
def test_a_branch_of_which_nothing_stays_leaves_its_bias(keep: dict[str, tuple[int, ...]]) -> None:
    program = block(allow_empty=True)
    chosen = plan(program, **keep)
    result = cut(program, chosen)
    agree(program, chosen, result)
    gone = {"head": ("qkv.weight", "proj.weight"), "ffn": ("fc1.weight", "fc2.weight")}
    for kind, names in gone.items():
        assert all((name in result.tensors) == bool(keep.get(kind, (0,))) for name in names)
    assert "proj.bias" in result.tensors
    Pipeline((PropagateAxes(), FindGroups())).run(result)  # still a program that can be analysed


class Products(nn.Module):
    """A residual branch of plain products: what is multiplied first is no bias."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(32, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(x @ self.up)
        if self.how == "addmm":
            return x + torch.addmm(self.bias, inner, self.down)
        branch: Tensor = getattr(torch, self.how)(inner, self.down)
        return x + branch


@pytest.mark.parametrize("how", ["matmul", "mm", "addmm"])
def test_a_branch_of_products_leaves_what_is_added_and_no_factor(how: str) -> None:
    torch.manual_seed(0)
    passes = (Clean(), PropagateAxes(), FindGroups(align=1, allow_empty=True))
    program = Pipeline(passes).run(capture(Products(how), (torch.randn(4, 8),)))
    chosen = plan(program, ffn=())
    result, flat = cut(program, chosen), [torch.randn(4, 8)]
    assert relative_error(run_flat(result, flat), masked_run(program, chosen, flat)) < 1e-6
    assert "down" not in result.tensors


def test_dropping_a_branch_needs_permission() -> None:
    program = block()
    with pytest.raises(PlanError, match="allow_empty=True"):
        cut(program, plan(program, ffn=()))


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (Choice("ffn", 31, (0,)), "32 elements here and 31"),
        (Choice("ffn", 32, (1, 0)), "sorted and unique"),
        (Choice("ffn", 32, (0, 0)), "sorted and unique"),
        (Choice("ffn", 32, (0, 32)), "out of range"),
        (Choice("ffn", 32, (-1, 2)), "out of range"),
    ],
)
def test_plans_that_do_not_fit(choice: Choice, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        cut(block(), CompressionPlan({"fc1:ffn": choice}))


def test_an_unknown_group_gets_the_nearest_name() -> None:
    with pytest.raises(PlanError, match="did you mean 'fc1:ffn'"):
        cut(block(), CompressionPlan({"fc11:ffn": Choice("ffn", 32, (0,))}))


def test_frozen_groups_stay() -> None:
    program = block()
    name = next(g.name for g in program.need("groups") if g.frozen and g.size == 5)
    with pytest.raises(PlanError, match="frozen"):
        cut(program, CompressionPlan({name: Choice("other", 5, (0, 1))}))


def test_a_wrong_literal_is_an_internal_error() -> None:
    """Predicted shape and propagated shape are compared: a forgotten literal cannot pass."""
    program = block()
    axes = program.need("axes")
    forgotten = tuple(lit for lit in axes.literals if "reshape" not in lit.node and "view" not in lit.node)
    assert forgotten != axes.literals
    from dataclasses import replace

    broken = program.but(axes=replace(axes, literals=forgotten), plan=plan(program, head=(0, 1)))
    with pytest.raises((InternalError, RuntimeError)):
        Pipeline((SliceAxes(),), start=("axes", "groups", "plan")).run(broken)


def test_literals_are_data() -> None:
    for literal in block().need("axes").literals:
        assert isinstance(literal, Literal)
        assert literal.form in {"shape", "sum", "split", "scale"}


def test_tied_weights_stay_tied() -> None:
    program = analysed("tied")
    result = sliced(program, random_plan(program, ALL_KINDS, 0.5, seed=0))
    assert len({t.data_ptr() for t in result.tensors.values()}) <= len({t.data_ptr() for t in program.tensors.values()})
    flat = inputs(program, 3)
    assert relative_error(run_flat(result, flat), run_flat(program, flat)) > 0


def test_made_nodes_carry_their_pass_and_source_line() -> None:
    program = block(allow_empty=True)
    result = cut(program, plan(program, ffn=()))
    made = [n for n in result.graph.nodes if n.meta.get("fxprune_pass")]
    assert made
    assert all(isinstance(n, Node) and n.meta["fxprune_pass"] == "slice-axes" for n in made)
    assert any("fc2" in (n.meta.get("stack_trace") or "") for n in made)


class SizedByData(nn.Module):
    """A table cut at a length that the ids decide, as the relative positions of DeBERTa are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 16))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        first, last = ids.min().item(), ids.max().item()  # a slice between two of them has a size of its own
        rows = self.table[first:last]
        return self.down(self.up(rows).relu().sum(0)) + ids.float().mean()


def test_sizes_that_data_decides_keep_their_symbols() -> None:
    ids = torch.tensor([[3, 5, 9], [1, 2, 4]])
    program = Pipeline((Clean(), PropagateAxes(), FindGroups(align=1))).run(capture(SizedByData(), (ids,)))
    cut = random_plan(program, ALL_KINDS, 0.5, seed=0)
    assert any(slot.parameter == "table" for g in program.need("groups") if g.name in cut.choices for slot in g.slots)
    result = sliced(program, cut)
    for other in (ids, torch.tensor([[7, 1]])[:, [0, 1, 0]].repeat(2, 1)):
        assert relative_error(run_flat(result, [other]), masked_run(program, cut, [other])) < 1e-4


def test_a_convolution_cut_to_one_channel_still_costs_what_it_costs() -> None:
    """Both channel dims then are of size 1, like those of a transposed convolution: strides tell them apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    program = Pipeline((Clean(), PropagateAxes(), FindGroups(align=1))).run(capture(model, (torch.randn(2, 3, 8, 8),)))
    groups = [g for g in program.need("groups") if g.prunable]
    cut = CompressionPlan({g.name: Choice(str(g.kind), g.size, (0,)) for g in groups})
    again = Pipeline((PropagateAxes(),)).run(sliced(program, cut))
    assert CostModel(again)() == CostModel(program)({g.axis: 1 for g in groups})
    assert CostModel(again)().flops == 4 * 4 * 27 + 2 * 2 * 9 + 2 * 2 * 5
