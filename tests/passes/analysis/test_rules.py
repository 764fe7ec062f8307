"""Every op rule against brute force: cut each axis the rule leaves alone, and hold the result against the dense op.

The tensors hold distinct labels (an arange), so an element that lands in the wrong place is seen. Per axis: the op on
sliced inputs, with its literals recomputed, must equal the op on full inputs with the removed elements masked where the
rule says they are contracted, indexed where the rule says they came out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune.ops  # noqa: F401  registers them
from fxprune.ir.axes import Axes
from fxprune.ir.axis import Axis, kept_index, leaves
from fxprune.ir.dataflow import op_name
from fxprune.ir.flops import check_counts
from fxprune.ir.program import Program
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.walk import RULES
from fxprune.passes.transform.resize import resize
from fxprune.testing import masked, run_flat


class Case(nn.Module):
    """The op applied to parameters, so that every dim may be sliced."""

    def __init__(self, op: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.op = op
        self.tensors = nn.ParameterList([nn.Parameter(labelled(shape, i)) for i, shape in enumerate(shapes)])

    def forward(self, unused: Tensor) -> Any:
        return self.op(*self.tensors)


def labelled(shape: tuple[int, ...], seed: int) -> Tensor:
    """Distinct values in [0.5, 2): labels that survive products and norms."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 1.5 * order.double() / count).view(shape)


def analysed(op: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> Program:
    exported = torch.export.export(Case(op, shapes), (torch.zeros(1),), strict=False)
    return PropagateAxes().run(Program(exported))


def free_axes(program: Program) -> list[Axis]:
    """Leaf axes of the inputs that the op itself does not freeze."""
    axes: Axes = program.need("axes")
    by_op = {a for f in axes.frozen if f.node != "output" for a in leaves(f.dim)}
    inputs = (axes.dims[p] for p in program.tensor_of_placeholder)
    found = dict.fromkeys(a for dims in inputs for d in dims for a in leaves(d))
    return [a for a in found if a not in by_op]


def check_law(op: Callable[..., Any], shapes: Sequence[tuple[int, ...]], live: int) -> None:
    program = analysed(op, shapes)
    axes: Axes = program.need("axes")
    assert not axes.unknown, f"no rule: {axes.unknown}"
    assert not axes.failed
    check_counts(program)
    free = free_axes(program)
    assert len(free) >= live, f"{len(free)} axes may be cut, at least {live} expected"
    out_nodes = next(n for n in program.graph.nodes if n.op == "output").args[0]
    for axis in free:
        keep = {axis: torch.arange(0, axis.size, 2)}
        want = masked(program, keep, [torch.zeros(1)])
        got = run_flat(Program(resize(program, keep)), [torch.zeros(1)])
        for node, dense, small in zip(out_nodes, want, got, strict=True):
            for position, dim in enumerate(axes.dims[node.name]):
                dense = dense.index_select(position, kept_index(dim, keep))
            torch.testing.assert_close(small, dense, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Op:
    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    live: int  # axes that must stay free, so that a rule cannot pass by freezing everything


MASK = torch.tensor([[True, False, True], [False, False, True]])
INDEX = torch.tensor([2, 0])

fxprune_ops = torch.ops.fxprune
PLACE = torch.tensor([[0, 1, 1, 2], [0, 2, 1, 2]])
OPS = [
    Op("merge_tokens", lambda x, m: fxprune_ops.merge_tokens(x, m, None, 2, 1)[0], ((2, 7, 4), (2, 7, 3)), 3),
    Op("prune_tokens", lambda x, s: fxprune_ops.prune_tokens(x, s, None, 2, 1)[0], ((2, 7, 4), (2, 7)), 2),
    Op(
        "adapt_tokens",
        lambda x, m, s: fxprune_ops.adapt_tokens(x, m, s, None, 2, 1, 0.05)[0],
        ((2, 7, 4), (2, 7, 3), (2, 7)),
        3,
    ),
    Op(
        "transform_tokens",
        lambda x, m, s: fxprune_ops.transform_tokens(x, m, s, None, 2, 1, 0.1)[0],
        ((2, 7, 4), (2, 7, 3), (2, 7)),
        3,
    ),
    Op(
        "pagerank_tokens",
        lambda x, a, m: fxprune_ops.pagerank_tokens(x, a.softmax(-1), m, None, 3, 1, 1, 2)[0],
        ((2, 7, 4), (2, 3, 7, 7), (2, 7, 3)),
        4,
    ),
    Op("drop_tokens", lambda x: fxprune_ops.drop_tokens(x, None, 2, 1, 0)[0], ((2, 7, 4),), 2),
    Op("remove_token", lambda x: fxprune_ops.remove_token(x, None, 2)[0], ((2, 7, 4),), 2),
    Op("restore_tokens", lambda x: fxprune_ops.restore_tokens(x, PLACE), ((2, 3, 4),), 1),
    Op("attention_map", lambda q, k: fxprune_ops.attention_map(q, k, None, 0.5, 0), ((2, 3, 5, 4), (2, 3, 5, 4)), 3),
    Op(
        "attention_map rows",
        lambda q, k: fxprune_ops.attention_map(q, k, None, 0.5, 1),
        ((2, 3, 5, 4), (2, 3, 5, 4)),
        3,
    ),
    Op(
        "token_score",
        lambda a, v: fxprune_ops.token_score(a.softmax(-1), v, "class-value", 1),
        ((2, 3, 5, 5), (2, 3, 5, 4)),
        3,
    ),
    Op(
        "token_score received",
        lambda a, v: fxprune_ops.token_score(a.softmax(-1), v, "received-value", 0),
        ((2, 3, 5, 5), (2, 3, 5, 4)),
        3,
    ),
    Op("add", lambda x, y: x + y, ((2, 3, 4), (3, 1)), 3),
    Op("mul broadcast", lambda x, y: x * y, ((2, 1, 4), (3, 1)), 3),
    Op("gelu", F.gelu, ((2, 3),), 2),
    Op("masked_fill", lambda x: x.masked_fill(MASK, 0.0), ((4, 2, 3),), 1),
    Op("where", lambda x, y: torch.where(x > y, x, y), ((2, 4), (2, 4)), 2),
    Op(
        "second names",
        lambda x, y: (
            torch.absolute(torch.divide(torch.subtract(torch.multiply(x, y), y), 3))
            + torch.arctan(x)
            + torch.negative(y)
        ),
        ((2, 4), (2, 4)),
        2,
    ),
    Op("comparisons", lambda x, y: torch.greater(x, y) + torch.less_equal(x, 1) + x, ((2, 4), (2, 4)), 2),
    Op("copy", torch.ops.aten.copy, ((2, 3, 4), (3, 4)), 3),
    Op("fill", lambda x: torch.fill(x, 0.5) + x, ((2, 3),), 2),
    Op("fill by a tensor", lambda x, y: torch.fill(x, y) + x, ((2, 3), ()), 2),
    Op("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y)[0] * y, ((3, 1), (2, 3, 4)), 3),
    Op("polar", lambda x, y: torch.view_as_real(torch.polar(x, y)), ((2, 3), (2, 3)), 2),
    Op(
        "complex product",
        lambda x, y: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y)),
        ((2, 3, 2), (3, 2)),
        2,
    ),
    Op("clone", lambda x: x.clone().contiguous(), ((2, 3),), 2),
    Op("type_as", lambda x, y: x.type_as(y), ((2, 3), (4, 5)), 4),
    Op("zeros_like", lambda x: torch.zeros_like(x) + x, ((2, 3),), 2),
    Op("glu", lambda x: F.glu(x, 1), ((2, 8),), 2),
    Op("prelu", F.prelu, ((2, 4, 3), (4,)), 3),
    Op("full", lambda x: x + torch.full((2, 4), 3.0, dtype=x.dtype), ((2, 4),), 2),
    Op("new_ones", lambda x: x + x.new_ones((2, 4)), ((2, 4),), 2),
    Op("arange freezes", lambda x: x + torch.arange(4, dtype=x.dtype), ((2, 4),), 1),
    Op("linear", lambda x, w, b: F.linear(x, w, b), ((2, 3, 4), (6, 4), (6,)), 4),
    Op("addmm", torch.addmm, ((6,), (3, 4), (4, 6)), 3),
    Op("mm", torch.mm, ((3, 4), (4, 6)), 3),
    Op("bmm", torch.bmm, ((2, 3, 4), (2, 4, 6)), 4),
    Op("baddbmm", torch.baddbmm, ((2, 3, 6), (2, 3, 4), (2, 4, 6)), 4),
    Op("matmul broadcast", torch.matmul, ((2, 5, 3, 4), (5, 4, 6)), 5),
    Op("matmul vector", torch.matmul, ((3, 4), (4,)), 2),
    Op("vector matmul", torch.matmul, ((4,), (2, 4, 3)), 3),
    Op("outer", torch.outer, ((3,), (4,)), 2),
    Op("inner", torch.inner, ((2, 3, 4), (5, 4)), 4),
    Op("tensordot", lambda x, y: torch.tensordot(x, y, dims=([1, 2], [1, 0])), ((2, 3, 4), (4, 3, 5)), 4),
    Op("addmv", torch.addmv, ((3,), (3, 4), (4,)), 2),
    Op("einsum", lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), ((2, 3, 4, 5), (2, 3, 6, 5)), 5),
    Op("einsum sum", lambda x, y: torch.einsum("bij,jk->bk", x, y), ((2, 3, 4), (4, 5)), 3),
    Op("einsum ellipsis", lambda x, y: torch.einsum("...d,od->...o", x, y), ((2, 3, 4), (5, 4)), 4),
    Op("einsum implicit", lambda x, y: torch.einsum("bij,jk", x, y), ((2, 3, 4), (4, 5)), 4),
    Op("einsum element by element", lambda x, y: torch.einsum("bi,bi->bi", x, y), ((2, 3), (2, 3)), 2),
    Op(
        "einsum of three",
        lambda x, u, y: torch.einsum("bxi,oij,byj->boxy", x, u, y),
        ((2, 3, 4), (5, 4, 6), (2, 7, 6)),
        6,
    ),
    Op(
        "einsum of four",
        lambda x, y, z, u: torch.einsum("bi,ij,jk,kb->bk", x, y, z, u),
        ((2, 3), (3, 4), (4, 5), (5, 2)),
        4,
    ),
    Op("attention", F.scaled_dot_product_attention, ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)), 5),
    Op(
        "attention mask",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6), (4, 3, 5)),
        5,
    ),
    Op(
        "attention gqa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ((2, 8, 3, 6), (2, 4, 3, 6), (2, 4, 3, 6)),
        4,
    ),
    Op("softmax", lambda x: x.softmax(-1), ((2, 3, 4),), 2),
    Op("log_softmax", lambda x: F.log_softmax(x, 1), ((2, 3, 4),), 2),
    Op("conv2d", lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 4, 5, 5), (6, 4, 3, 3), (6,)), 3),
    Op("conv1d", lambda x, w: F.conv1d(x, w), ((2, 4, 5), (6, 4, 1)), 3),
    Op("grouped conv", lambda x, w: F.conv2d(x, w, groups=2), ((2, 8, 3, 3), (6, 4, 1, 1)), 3),
    Op("depthwise conv", lambda x, w, b: F.conv2d(x, w, b, groups=4), ((2, 4, 3, 3), (4, 1, 3, 3), (4,)), 2),
    Op("depthwise multiplier", lambda x, w: F.conv2d(x, w, groups=4), ((2, 4, 3, 3), (8, 1, 3, 3)), 3),
    Op(
        "conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), ((2, 4, 3, 3), (4, 6, 2, 2), (6,)), 3
    ),
    Op("conv_transpose groups", lambda x, w: F.conv_transpose2d(x, w, groups=2), ((2, 4, 3, 3), (4, 3, 2, 2)), 3),
    Op("max_pool2d", lambda x: F.max_pool2d(x, 2), ((2, 4, 4, 4),), 2),
    Op("avg_pool2d", lambda x: F.avg_pool2d(x, 2), ((2, 4, 4, 4),), 2),
    Op("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1), ((2, 4, 4, 4),), 2),
    Op("interpolate", lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), ((2, 4, 3, 3),), 2),
    Op("grid_sample", lambda x, g: F.grid_sample(x, g, align_corners=False), ((4, 6, 3, 3), (4, 2, 2, 2)), 2),
    Op("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), ((2, 12, 3, 3),), 2),
    Op("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), ((2, 3, 4, 4),), 2),
    Op("channel_shuffle", lambda x: F.channel_shuffle(x, 2), ((2, 8, 3, 3),), 2),
    Op("im2col", lambda x: F.unfold(x, 2), ((2, 4, 3, 3),), 2),
    Op("col2im", lambda x: F.fold(x, (3, 3), 2), ((2, 16, 4),), 2),
    Op(
        "batch_norm",
        lambda x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach(), w, b),
        ((2, 4, 3), (4,), (4,), (4,), (4,)),
        3,
    ),
    Op("layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b), ((2, 3, 6), (6,), (6,)), 3),
    Op("rms_norm", lambda x, w: F.rms_norm(x, (6,), w), ((2, 3, 6), (6,)), 3),
    Op("group_norm", lambda x, w, b: F.group_norm(x, 4, w, b), ((2, 16, 3), (16,), (16,)), 3),
    Op("sum", lambda x: x.sum((1, -1)), ((2, 3, 4),), 3),
    Op("sum keepdim", lambda x: x.sum(1, keepdim=True), ((2, 3, 4),), 3),
    Op("norm", lambda x: torch.linalg.vector_norm(x, dim=-1), ((2, 3, 4),), 3),
    Op("linalg.norm", lambda x: torch.linalg.norm(x, dim=-1, keepdim=True), ((2, 3, 4),), 3),
    Op("matrix norm freezes", lambda x: torch.linalg.norm(x, dim=(1, 2)) + x[:, 0, 0], ((2, 3, 4),), 0),
    Op("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, dim=1), ((2, 3, 4), (2, 3, 4)), 3),
    Op("nansum", lambda x: x.nansum(1), ((2, 3, 4),), 3),
    Op("max-norm freezes", lambda x: torch.linalg.vector_norm(x, ord=float("inf"), dim=-1), ((2, 3, 4),), 2),
    Op("mean", lambda x: x.mean(1), ((2, 3, 4),), 3),
    Op("var", lambda x: x.var(-1, unbiased=False, keepdim=True), ((2, 3, 4),), 3),
    Op("amax", lambda x: x.amax(-1), ((2, 3, 4),), 2),
    Op("max dim", lambda x: x.max(1)[0], ((2, 3, 4),), 2),
    Op("maximum", torch.maximum, ((2, 3), (2, 3)), 2),
    Op("argmax", lambda x: x.argmax(-1), ((2, 3, 4),), 2),
    Op("cumsum", lambda x: x.cumsum(1), ((2, 3, 4),), 2),
    Op("flip", lambda x: x.flip(0), ((2, 3, 4),), 2),
    Op("sort", lambda x: x.sort(-1)[0], ((2, 3, 4),), 2),
    Op("topk", lambda x: x.topk(2, -1)[0], ((2, 3, 4),), 2),
    Op("tril", lambda x: x.tril(), ((2, 3, 4, 4),), 2),
    Op("view splits", lambda x: x.view(2, 3, 4), ((2, 12),), 3),
    Op("view joins", lambda x: x.view(2, 12), ((2, 3, 4),), 3),
    Op("view across", lambda x: x.view(6, 2, 2), ((2, 3, 4),), 4),
    Op("view -1", lambda x: x.view(-1, 4), ((2, 3, 4),), 3),
    Op("flatten", lambda x: x.flatten(1), ((2, 3, 4),), 3),
    Op("unflatten", lambda x: x.unflatten(1, (3, 4)), ((2, 12),), 3),
    Op("permute", lambda x: x.permute(2, 0, 1), ((2, 3, 4),), 3),
    Op("transpose", lambda x: x.transpose(-1, 0), ((2, 3, 4),), 3),
    Op("movedim", lambda x: x.movedim((0, 2), (1, 0)), ((2, 3, 4),), 3),
    Op("t", lambda x: x.t(), ((2, 3),), 2),
    Op("mT", lambda x: x.mT, ((2, 3, 4),), 3),
    Op("squeeze", lambda x: x.squeeze(1).unsqueeze(-1), ((2, 1, 4),), 2),
    Op("expand", lambda x, y: x.expand(2, 3, 4) + y, ((3, 1), (2, 3, 4)), 3),
    Op("expand_as", lambda x, y: x.expand_as(y) * y, ((3, 1), (2, 3, 4)), 3),
    Op("repeat", lambda x: x.repeat(2, 3), ((2, 4),), 2),
    Op("repeat_interleave", lambda x: x.repeat_interleave(3, dim=1), ((2, 4),), 2),
    Op("roll", lambda x: x.roll(1, 1), ((2, 3, 4),), 2),
    Op("pad", lambda x: F.pad(x, (1, 1)), ((2, 3, 4),), 2),
    Op("tensor unfold", lambda x: x.unfold(1, 2, 1), ((2, 3, 4),), 2),
    Op("cat", lambda x, y: torch.cat([x, y], 1), ((2, 3), (2, 4)), 3),
    Op("cat of one twice", lambda x: torch.cat([-x, x], 1), ((2, 3),), 2),
    Op("stack", lambda x, y: torch.stack([x, y], 1), ((2, 3), (2, 3)), 2),
    Op("hstack", lambda x, y: torch.hstack([x, y]), ((2, 3), (2, 4)), 3),
    Op("vstack", lambda x, y: torch.vstack([x, y]), ((2, 3), (4, 3)), 3),
    Op("dstack", lambda x, y: torch.dstack([x, y]), ((2, 3, 4), (2, 3, 5)), 4),
    Op("column_stack", lambda x, y: torch.column_stack([x, y]), ((2, 3), (2, 4)), 3),
    Op("atleast_2d", lambda x: torch.atleast_2d(x), ((2, 3),), 2),
    Op("split", lambda x: torch.split(x, 2, 1), ((2, 6),), 4),
    Op("split_with_sizes", lambda x: torch.split(x, [2, 4], 1), ((2, 6),), 3),
    Op("chunk", lambda x: torch.chunk(x, 2, -1), ((2, 6),), 3),
    Op("tensor_split", lambda x: torch.tensor_split(x, 3, 1), ((2, 6),), 4),
    Op("chunk of a view", lambda x: torch.chunk(x.view(2, 6, 2), 3, 1), ((2, 12),), 5),
    Op("slice", lambda x: x[:, 2:4], ((2, 7),), 4),
    Op("slice head", lambda x: x[:, :4], ((2, 6),), 3),
    Op("slice tail", lambda x: x[:, 4:], ((2, 6),), 3),
    Op("slice all", lambda x: x[:, 0:6], ((2, 6),), 2),
    Op("slice strided", lambda x: x[:, 1::2], ((2, 6),), 2),
    Op("slice empty", lambda x: torch.cat([x[:, 6:], x], 1), ((2, 6),), 2),
    Op("narrow", lambda x: x.narrow(1, 2, 3), ((2, 7),), 4),
    Op("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 1), ((2, 3, 4), (2, 2, 4)), 2),
    Op("slice_scatter inside", lambda x, y: torch.slice_scatter(x, y, 1, 2, 4), ((2, 7, 4), (2, 2, 4)), 5),
    Op("slice_scatter across", lambda x, y: torch.slice_scatter(x, y.view(2, 4), 1, 2, 6), ((2, 8), (2, 2, 2)), 5),
    Op("slice_scatter whole", lambda x, y: torch.slice_scatter(x, y, 1, 0, 3), ((2, 3, 4), (2, 3, 4)), 3),
    Op("select_scatter", lambda x, y: torch.select_scatter(x, y, 1, 0), ((2, 3, 4), (2, 4)), 2),
    Op("unbind", lambda x: x.unbind(0), ((2, 3),), 1),
    Op("select", lambda x: x.select(1, 0), ((2, 3, 4),), 2),
    Op("embedding", lambda w: F.embedding(INDEX, w), ((5, 4),), 1),
    Op("index", lambda x: x[:, INDEX], ((2, 3, 4),), 2),
    Op("index apart", lambda x: x[INDEX, :, INDEX], ((3, 4, 3),), 1),
    Op("index_select", lambda x: x.index_select(1, INDEX), ((2, 3, 4),), 2),
    Op("gather", lambda x: x.gather(1, torch.zeros(2, 2, 4, dtype=torch.long)), ((2, 3, 4),), 0),
    Op("rotate half", lambda x, c: torch.cat([-x[..., 3:], x[..., :3]], -1) * c, ((2, 6), (6,)), 2),
    Op(
        "interleaved rope",
        lambda x, c: torch.stack([x[..., 0::2] * c, x[..., 1::2]], -1).flatten(-2),
        ((2, 6), (3,)),
        2,
    ),
    Op(
        "shuffle of a cat",
        lambda x, y: torch.cat([x, y], 1).view(2, 2, 4, 3).transpose(1, 2).reshape(2, 8, 3),
        ((2, 4, 3), (2, 4, 3)),
        3,
    ),
]


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name.replace(" ", "-"))
def test_rule_agrees_with_brute_force(op: Op) -> None:
    check_law(op.run, op.shapes, op.live)


def test_a_missing_coupling_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law is not blind: a rule that forgets to tie the bias to its rows fails."""

    def forgetful(w: Any, a: Any) -> Any:
        w.unify(a.input[-1], a.weight[1])
        w.contract(a.weight[1], ("input", len(a.input) - 1), ("weight", 1))
        w.matmul(a.input[:-1], (), a.weight[1], a.weight[0], "linear")
        return [*a.input[:-1], a.weight[0]]

    monkeypatch.setitem(RULES, "linear", forgetful)
    with pytest.raises(Exception, match=r"size|shape|dimension"):
        check_law(lambda x, w, b: F.linear(x, w, b), ((2, 4), (6, 4), (6,)), 1)


def test_a_wrong_order_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "transpose", lambda w, a: list(a.self))
    with pytest.raises(Exception, match=r"predict"):
        check_law(lambda x: x.transpose(0, 1), ((4, 4),), 1)


def test_an_unknown_op_freezes_what_it_touches() -> None:
    program = analysed(lambda x: torch.linalg.inv(x).sum(0), ((4, 4),))
    assert free_axes(program) == []
    assert program.need("axes").unknown


def test_batch_statistics_freeze_the_other_dims() -> None:
    """Weight standardisation: batch_norm with batch statistics on a weight reduces over everything but channels."""
    program = analysed(lambda x: F.batch_norm(x.view(1, 4, 6), None, None, training=True).view(4, 6), ((4, 6),))
    assert [a.size for a in free_axes(program)] == [4]


def test_boolean_indexing_freezes() -> None:
    program = analysed(lambda x, y: x[:, torch.tensor([True, False, True])] + y, ((2, 3), (2, 2)))
    assert all(a.size == 2 for a in free_axes(program))


def test_a_rule_that_fails_freezes_its_op_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(w: Any, a: Any) -> Any:
        w.unify(a.self[0], a.self[1])
        w.contract(a.self[0], ("self", 0))
        raise KeyError("no such thing")

    monkeypatch.setitem(RULES, "gelu", broken)
    program = analysed(lambda x, w: F.linear(F.gelu(x), w), ((3, 3), (4, 3)))
    assert [a.size for a in free_axes(program)] == [4]
    axes: Axes = program.need("axes")
    assert axes.failed == (("gelu", "the axis rule for aten.gelu.default failed (KeyError: 'no such thing')"),)
    assert {c.node for c in axes.contractions} == {"linear"}
    assert program.notes[-1].startswith("the axis rule for aten.gelu.default failed")


def test_a_rule_that_says_another_size_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "transpose", lambda w, a: list(a.self))
    program = analysed(lambda x: x.transpose(0, 1), ((3, 4),))
    assert "says [3, 4], the graph has [4, 3]" in program.need("axes").failed[0][1]
    assert free_axes(program) == []


def test_an_axis_that_meets_itself_shifted_is_no_recursion() -> None:
    """x[1:] + x[:-1] makes every element one with its neighbour, one by one."""
    program = analysed(lambda x: x[1:] + x[:-1], ((2000, 3),))
    assert [a.size for a in free_axes(program)] == [3]
    assert "shifted" in program.need("axes").conflicts[0][1]
    assert program.need("axes").failed == ()


def test_many_pieces_do_not_nest() -> None:
    def joined(x: Tensor) -> Tensor:
        out = x[:, :1]
        for part in x.split(1, 1)[:0:-1]:
            out = torch.cat([out, part * 2], 1)
        return out

    program = analysed(joined, ((2, 300),))
    assert program.need("axes").failed == ()


def test_every_rule_name_is_an_op() -> None:
    """A rule under a misspelled name would never fire."""
    known = set(dir(torch.ops.aten)) | {"pointwise"}
    missing = [n for n in RULES if "::" not in n and n not in known and not hasattr(torch.ops.aten, n)]
    assert missing == []


def test_op_names_drop_the_namespace_and_the_overload() -> None:
    exported = torch.export.export(Case(lambda x: x.sum(1), ((2, 3),)), (torch.zeros(1),))
    names = [op_name(n) for n in exported.graph.nodes if n.op == "call_function"]
    assert names == ["sum"]
