"""What the graph must look like before ``torch.onnx.export`` can be trusted with it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ...ir.fake_run import infer
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild, relax_views

aten = torch.ops.aten


@dataclass(frozen=True)
class RelaxViews(Transform):
    """``view`` as ``reshape``, for programs that come without ``Clean``."""

    def run(self, program: Program) -> Program:
        module = copy_graph(program.exported)
        changed = relax_views(module.graph)
        return program.without_facts(exported=rebuild(program.exported, module)) if changed else program


@dataclass(frozen=True)
class SpellOutAttention(Transform):
    """``scaled_dot_product_attention`` as matmul, softmax, matmul.

    Needed for two reasons. Its output strides depend on the kernel that torch picks while it decomposes, and the ONNX
    exporter decomposes and then runs the graph again with another kernel: a ``view`` that was legal is refused (T5).
    And its translation gives NaN for a row whose mask hides every key, where PyTorch gives zeros (left padding).
    """

    def run(self, program: Program) -> Program:
        module = copy_graph(program.exported)
        found = [n for n in module.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
        changed = [node for node in found if _spell_out(module.graph, node)]
        if not changed:
            return program
        return program.without_facts(exported=rebuild(program.exported, module))


@dataclass(frozen=True)
class CastMinuends(Transform):
    """``1.0 - mask`` of an integer mask with the cast written out, which the exporter forgets for this one op."""

    def run(self, program: Program) -> Program:
        module = copy_graph(program.exported)
        changed = False
        for node in list(module.graph.nodes):
            if node.target is not aten.rsub.Scalar or not isinstance(node.args[0], Node):
                continue
            source, dtype = node.args[0], node.meta["val"].dtype
            if source.meta["val"].dtype == dtype:
                continue
            with module.graph.inserting_before(node):
                cast = module.graph.call_function(aten.to.dtype, (source, dtype))
            cast.meta = {**node.meta, "val": source.meta["val"].to(dtype), "fxprune_pass": self.slug()}
            node.replace_input_with(source, cast)
            changed = True
        return program.without_facts(exported=rebuild(program.exported, module)) if changed else program


def _spell_out(graph: Graph, node: Node) -> bool:
    """Replace one attention node; False where its meaning cannot be kept (dropout)."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("dropout_p"):
        return False
    query, key, value = (_node(given[n]) for n in names[:3])
    mask, scale = given.get("attn_mask"), given.get("scale")
    with graph.inserting_before(node):
        emit = _Emitter(graph, node)
        if given.get("enable_gqa"):
            key, value = _repeat_heads(emit, query, key), _repeat_heads(emit, query, value)
        factor = _scale(emit, query) if scale is None else scale
        scores = emit(aten.matmul.default, emit(aten.mul.Tensor, query, factor), emit(aten.transpose.int, key, -2, -1))
        visible = _causal(emit, query, key) if given.get("is_causal") else None
        if isinstance(mask, Node):
            if mask.meta["val"].dtype is torch.bool:
                visible = mask
            else:
                scores = emit(aten.add.Tensor, scores, mask)
        if visible is not None:
            scores = emit(aten.masked_fill.Scalar, scores, emit(aten.logical_not.default, visible), float("-inf"))
        weights = emit(aten.softmax.int, scores, -1)
        if visible is not None and isinstance(mask, Node):  # a row that sees nothing is NaN here and 0 in PyTorch
            weights = emit(aten.masked_fill.Scalar, weights, emit(aten.logical_not.default, visible), 0.0)
        result = emit(aten.matmul.default, weights, value)
    result.meta["val"] = result.meta["val"].to(node.meta["val"].dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


class _Emitter:
    """Makes nodes that carry a fake value, the user's source line and this pass's name."""

    def __init__(self, graph: Graph, origin: Node) -> None:
        self.graph, self.origin = graph, origin

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
        node.meta["fxprune_pass"] = SpellOutAttention.slug()
        infer(node)
        return node


def _node(value: Any) -> Node:
    if not isinstance(value, Node):
        raise TypeError(f"attention takes tensors, got {value!r}")
    return value


def _size(emit: _Emitter, tensor: Node, dim: int) -> int | Node:
    """A size, or the node that reads it where it is open."""
    value: Tensor = tensor.meta["val"]
    size = value.shape[dim]
    return size if isinstance(size, int) else emit(aten.sym_size.int, tensor, value.dim() + dim)


def _scale(emit: _Emitter, query: Node) -> float | Node:
    """1 / sqrt(width) of the queries [.., width]; a tensor [] where the width is open."""
    width, value = _size(emit, query, -1), query.meta["val"]
    if isinstance(width, int):
        return float(width) ** -0.5
    return emit(aten.rsqrt.default, emit(aten.full.default, [], width, dtype=value.dtype, device=value.device))


def _repeat_heads(emit: _Emitter, query: Node, key: Node) -> Node:
    """[b, kv, s, d] -> [b, heads, s, d]: every KV head serves the query heads of its group, in order."""
    heads, groups = _size(emit, query, -3), _size(emit, key, -3)
    if isinstance(heads, int) and isinstance(groups, int):
        repeats: Any = heads // groups
        if repeats == 1:
            return key
    else:
        repeats = emit(operator.floordiv, heads, groups)
    rank = key.meta["val"].dim()
    shape: list[Any] = [-1] * (rank + 1)
    shape[rank - 2] = repeats
    spread = emit(aten.expand.default, emit(aten.unsqueeze.default, key, rank - 2), shape)
    return emit(aten.flatten.using_ints, spread, rank - 3, rank - 2)


def _causal(emit: _Emitter, query: Node, key: Node) -> Node:
    """Query i sees the keys 0..i. [queries, keys] bool"""

    def positions(tensor: Node) -> Node:
        value: Tensor = tensor.meta["val"]
        return emit(aten.arange.default, _size(emit, tensor, -2), device=value.device)

    return emit(aten.ge.Tensor, emit(aten.unsqueeze.default, positions(query), 1), positions(key))
