"""What the graph looks like for a GPU with the kernel: block-sparse layers where a table says that they win."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ...ir.dataflow import bind, find_bias, op_name
from ...ir.layer_editor import Replacing
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ops.block_sparse_linear import pack
from ...target.block_table import BlockTable
from ...target.gate import Decision, decide


@dataclass(frozen=True)
class UseKernels(Transform):
    """Layers with zeros in whole tiles become ``fxprune::block_sparse_linear`` where ``table`` says that it is faster;
    a GELU or SiLU that reads nothing but the layer is computed with it.

    table    what was measured, or None: then nothing is replaced
    device   where it will run, for the words when there is no table
    """

    table: BlockTable | None = field(default=None, repr=False)
    device: str = ""

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, tuple[Decision, ...]]:
        """(the program, a decision per sparse layer)."""
        decisions = tuple(decide(program, self.table, self.device))
        if not any(d.sparse for d in decisions):
            return program, decisions
        edit = Replacing(program, self.slug())
        for decision in decisions:
            if decision.sparse:
                self._replace(edit, decision)
        return program.without_facts(exported=edit.finish()), decisions

    def _replace(self, edit: Replacing, decision: Decision) -> None:
        layer, matrix = decision.layer, decision.layer.matrix
        node = edit.nodes[matrix.node]
        weight = matrix.matrix(edit.program.tensors[matrix.parameter].detach())
        tiles, offsets, columns = (
            edit.tensor(matrix.weight, name, value)
            for name, value in zip(("tiles", "offsets", "columns"), pack(weight, layer.live, layer.tile), strict=True)
        )
        last, activation = _activation(node)
        bias = find_bias(node)
        with edit.graph.inserting_before(node):
            new = edit.call(
                node,
                torch.ops.fxprune.block_sparse_linear.default,
                bind(node)[matrix.operand],
                tiles,
                offsets,
                columns,
                bias,
                matrix.shape[0],
                activation,
            )
        edit.instead(last, new)
        if last is not node:
            edit.graph.erase_node(node)


def _activation(node: Node) -> tuple[Node, str]:
    """(the node whose value the kernel gives, the activation in it)."""
    if len(node.users) == 1:
        user = next(iter(node.users))
        name = op_name(user)
        if name == "silu" or (name == "gelu" and bind(user).get("approximate", "none") == "none"):
            return user, name
    return node, "none"
