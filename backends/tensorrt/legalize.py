"""What the graph must look like for torch-tensorrt's converters to take it with open sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...ir.dataflow import bind
from ...ir.layer_editor import Replacing
from ...ir.pipeline import Transform
from ...ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SpellOutGathers(Transform):
    """``gather`` with open sizes as ``index_select`` on the flat tensor: its converter only takes fixed sizes."""

    def run(self, program: Program) -> Program:
        found = [n.name for n in program.graph.nodes if n.target is aten.gather.default and _is_open(n)]
        if not found:
            return program
        edit = Replacing(program, self.slug())
        for name in found:
            _spell_out(edit, edit.nodes[name])
        return program.without_facts(exported=edit.finish())


@dataclass(frozen=True)
class PoolByMean(Transform):
    """Pooling to one value as a mean: its decomposition asks for strides, which an engine does not have."""

    def run(self, program: Program) -> Program:
        found = [
            n.name
            for n in program.graph.nodes
            if n.target is aten.adaptive_avg_pool2d.default and list(bind(n)["output_size"]) == [1, 1]
        ]
        if not found:
            return program
        edit = Replacing(program, self.slug())
        for name in found:
            node = edit.nodes[name]
            with edit.graph.inserting_before(node):
                mean = edit.call(node, aten.mean.dim, node.args[0], [-2, -1], True)
            edit.instead(node, mean)
        return program.without_facts(exported=edit.finish())


@dataclass(frozen=True)
class SpellOutMaxima(Transform):
    """The largest (or least) along a dimension and where it lies, with open sizes, as two ops: ``amax``, ``argmax``."""

    def run(self, program: Program) -> Program:
        found = [n.name for n in program.graph.nodes if n.target in EXTREMES and _is_open(n)]
        if not found:
            return program
        edit = Replacing(program, self.slug())
        for name in found:
            node = edit.nodes[name]
            value, place = EXTREMES[node.target]
            given = bind(node)
            source, dim, keep = given["self"], given["dim"], bool(given["keepdim"])
            for item in list(node.users):
                with edit.graph.inserting_before(item):
                    new = (
                        edit.call(node, value, source, [dim], keep)
                        if item.args[1] == 0
                        else edit.call(node, place, source, dim, keep)
                    )
                edit.instead(item, new)
            edit.graph.erase_node(node)
        return program.without_facts(exported=edit.finish())


EXTREMES: dict[Any, tuple[Any, Any]] = {
    aten.max.dim: (aten.amax.default, aten.argmax.default),
    aten.min.dim: (aten.amin.default, aten.argmin.default),
}
FOR_CONVERTERS = (SpellOutGathers, SpellOutMaxima)
"""What torch-tensorrt's converters need; the ONNX path does without."""


def _is_open(node: Node) -> bool:
    return any(isinstance(size, torch.SymInt) for n in node.all_input_nodes for size in n.meta["val"].shape)


def _spell_out(edit: Replacing, node: Node) -> None:
    """Rows of what is gathered from lie behind one another: row r begins at r times its length."""
    source, given, index = cast("tuple[Node, int, Node]", node.args[:3])
    rank = index.meta["val"].dim()
    dim = given % rank
    with edit.graph.inserting_before(node):

        def emit(target: Any, *args: Any) -> Node:
            return edit.call(node, target, *args)

        def size(tensor: Node, position: int) -> Any:
            known = tensor.meta["val"].shape[position]
            return emit(aten.sym_size.int, tensor, position) if isinstance(known, torch.SymInt) else int(known)

        for i in range(rank):  # an index may stop short in the other dimensions
            have, want = source.meta["val"].shape[i], index.meta["val"].shape[i]
            if i != dim and not statically_known_true(have == want):
                source = emit(aten.slice.Tensor, source, i, 0, size(index, i))
        if dim != rank - 1:
            source, index = emit(aten.transpose.int, source, dim, -1), emit(aten.transpose.int, index, dim, -1)
        shape = [size(index, i) for i in range(rank)]
        length, rows = size(source, rank - 1), emit(aten.reshape.default, index, [-1, shape[-1]])
        if not all(statically_known_true(s == 1) for s in index.meta["val"].shape[:-1]):
            starts = emit(aten.mul.Tensor, emit(aten.arange.default, size(rows, 0)), length)
            rows = emit(aten.add.Tensor, rows, emit(aten.unsqueeze.default, starts, 1))
        flat = emit(
            aten.index_select.default,
            emit(aten.reshape.default, source, [-1]),
            0,
            emit(aten.reshape.default, rows, [-1]),
        )
        result = emit(aten.reshape.default, flat, shape)
        if dim != rank - 1:
            result = emit(aten.transpose.int, result, dim, -1)
    edit.instead(node, result)
