"""``FoldIndices``: what ``Unshare`` put in and slicing did not use goes again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ...ir.dataflow import bind
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild
from .unshare import PREFIX


@dataclass(frozen=True)
class FoldIndices(Transform):
    """Remove the indices of ``Unshare`` that select everything in order."""

    def run(self, program: Program) -> Program:
        whole = {n.name for n in program.placeholders() if _selects_all(program, n)}
        if not whole:
            return program
        module = copy_graph(program.exported)
        for node in list(module.graph.nodes):
            if node.op == "placeholder" and node.name in whole:
                for user in list(node.users):
                    user.replace_all_uses_with(user.all_input_nodes[0])
                    module.graph.erase_node(user)
                module.graph.erase_node(node)
        return program.without_facts(exported=rebuild(program.exported, module))


def _selects_all(program: Program, node: Node) -> bool:
    name = program.tensor_of_placeholder.get(node.name, "")
    if not name.startswith(PREFIX) or not node.users:
        return False
    index = program.tensors[name]
    if not torch.equal(index, torch.arange(len(index))):
        return False
    for user in node.users:
        if user.target is not torch.ops.aten.index_select.default:
            return False
        given = bind(user)
        if given["index"] is not node or given["self"].meta["val"].shape[given["dim"]] != len(index):
            return False
    return True
