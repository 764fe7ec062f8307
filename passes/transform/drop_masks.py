"""``DropMasks``: attention without a mask that hides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node, map_arg

from ...ir.dataflow import Family, bind, family, is_random
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

LARGEST = 2**24  # entries of a mask that is looked at


@dataclass(frozen=True)
class DropMasks(Transform):
    """Take away the mask of a ``scaled_dot_product_attention`` where it is a constant that hides nothing.

    Some libraries hand one to every encoder (all True, made of ``arange``); it costs a pass over all pairs of tokens,
    keeps kernels from their quick form, and ties attention to the number of tokens. Exact: a boolean mask that is True
    everywhere, or a floating one that is zero everywhere. Constant: made of constants and buffers alone, except that
    it may be spread over the batch.
    """

    def run(self, program: Program) -> Program:
        module = copy_graph(program.exported)
        bound = program.tensor_of_placeholder
        fixed = {
            n: program.tensors[name]
            for n, name in bound.items()
            if n not in program.exported.graph_signature.inputs_to_parameters
        }
        changed = False
        for node in module.graph.nodes:
            if family(node) is not Family.ATTENTION:
                continue
            mask = bind(node)["attn_mask"]
            if not isinstance(mask, Node) or not _hides_nothing(mask, fixed):
                continue
            node.args = tuple(None if value is mask else value for value in node.args)
            node.kwargs = {k: v for k, v in node.kwargs.items() if v is not mask}
            changed = True
        if not changed:
            return program
        module.graph.eliminate_dead_code()
        return program.without_facts(exported=rebuild(program.exported, module))


def _hides_nothing(mask: Node, fixed: Mapping[str, Tensor]) -> bool:
    while family(mask) is Family.EXPAND:
        mask = mask.all_input_nodes[0]
    value = mask.meta.get("val")
    if not isinstance(value, Tensor) or any(isinstance(s, SymInt) for s in value.shape) or value.numel() > LARGEST:
        return False
    known = _constant(mask, fixed, {})
    if not isinstance(known, Tensor):
        return False
    return bool(known.all()) if known.dtype is torch.bool else known.is_floating_point() and not bool(known.any())


def _constant(node: Node, fixed: Mapping[str, Tensor], done: dict[Node, Any]) -> Any:
    """The value of a node that depends on no input, parameter or open size; None for any other."""
    if node not in done:
        done[node] = None
        if node.name in fixed:
            done[node] = fixed[node.name]
        elif node.op == "call_function" and not is_random(node):
            inputs = {n: _constant(n, fixed, done) for n in node.all_input_nodes}
            if all(v is not None for v in inputs.values()):
                args, kwargs = map_arg((node.args, node.kwargs), inputs.__getitem__)
                done[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return done[node]
