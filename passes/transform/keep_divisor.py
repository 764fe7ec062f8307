"""Means and norms that keep the dense model's divisor when what they average is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from ...ir.axes import Literal
from ...ir.axis import Axis, kept_total, total
from ...ir.dataflow import bind, op_name

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def keep_divisor(graph: Graph, node: Node, literal: Literal, counts: Mapping[Axis, int], made_by: str) -> None:
    """Make ``node`` divide by the dense count of the literal's dims: as if what is cut were there and zero.

    A mean over k of d elements is scaled by k / d. A norm is written out, from the sum and the length of each row:

        ``m = sum(x) / d``      ``var = (|x - m|^2 + (d - k) m^2) / d``      ``y = (x - m) / sqrt(var + eps) * w + b``

    and without m for RMS norms: the d - k elements that are gone are zeros, each m away from the mean. Half precision
    is averaged in fp32, as the fused op does.
    """
    dense = kept = 1
    for dim in literal.dims:
        dense, kept = dense * total(dim), kept * kept_total(dim, counts)
    write = _Writer(graph, node, made_by)
    if literal.form == "mean":
        with graph.inserting_after(node):
            scaled = write(aten.mul.Tensor, node, kept / dense)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return
    with graph.inserting_before(node):
        out = _norm(write, node, dense, dense - kept)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


class _Writer:
    """Adds ops to a graph in the name of the node that they replace."""

    def __init__(self, graph: Graph, node: Node, made_by: str) -> None:
        self.graph = graph
        self.meta = {"stack_trace": node.meta.get("stack_trace"), "fxprune_pass": made_by}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta.update(self.meta)
        return made


def _norm(write: _Writer, node: Node, dense: int, gone: int) -> Node:
    given = bind(node)
    x, dtype, eps = given["input"], given["input"].meta["val"].dtype, given.get("eps")
    wide = write(aten.to.dtype, x, torch.float32) if dtype in HALF else x
    rest = None
    if op_name(node) == "layer_norm":
        mean = write(aten.div.Tensor, write(aten.sum.dim_IntList, wide, [-1], True), dense)
        wide = write(aten.sub.Tensor, wide, mean)
        rest = write(aten.mul.Tensor, write(aten.mul.Tensor, mean, mean), gone)
    squares = write(aten.sum.dim_IntList, write(aten.mul.Tensor, wide, wide), [-1], True)
    variance = write(aten.div.Tensor, squares if rest is None else write(aten.add.Tensor, squares, rest), dense)
    small = torch.finfo(torch.float32 if dtype in HALF else dtype).eps if eps is None else eps
    out = write(aten.mul.Tensor, wide, write(aten.rsqrt.default, write(aten.add.Tensor, variance, small)))
    out = write(aten.to.dtype, out, dtype) if dtype in HALF else out
    for factor, target in ((given.get("weight"), aten.mul.Tensor), (given.get("bias"), aten.add.Tensor)):
        out = out if factor is None else write(target, out, factor)
    return out
