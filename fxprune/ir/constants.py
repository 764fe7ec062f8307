"""Values that depend on no input: what they are made of, and what they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .dataflow import is_mutable, is_random
from .program import Program


def constant_nodes(program: Program) -> set[Node]:
    """Parameters, buffers and constants that the graph reads, and what is computed from these alone."""
    found = {n for n in program.placeholders() if n.name in program.tensor_of_placeholder}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        fixed = node.op == "call_function" and inputs and found.issuperset(inputs)
        if fixed and not is_mutable(node) and not is_random(node):
            found.add(node)
    return found


def evaluate(program: Program, wanted: Collection[Node]) -> dict[Node, Tensor]:
    """Values of nodes that depend on no input, in memory of their own."""
    bound, tensors = program.tensor_of_placeholder, program.tensors
    needed, values = set(wanted), dict[Node, Any]()
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                values[node] = tensors[bound[node.name]]
            else:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return {node: values[node].detach().clone(memory_format=torch.contiguous_format) for node in wanted}
