"""``PropagateAxes``: what every tensor dimension of the graph is made of."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ... import plugins
from ...errors import InternalError
from ...ir.axis import Conflict, new_dim, total
from ...ir.pipeline import Analysis
from ...ir.program import Program
from . import rules  # noqa: F401  (fills RULES)
from .walk import RULES, Args, Multi, Walk, op_name


@dataclass(frozen=True)
class PropagateAxes(Analysis):
    """Walk the graph once and state its axes, literals and costs (see ``fxprune.ir.axis`` for the data model).

    Gives ``program.axes``. Time is linear in the number of nodes; nothing is kept per element.
    An op without a rule freezes the axes it touches, with the reason: never guess.
    """

    gives = ("axes",)

    def run(self, program: Program) -> Program:
        walk = Walk(program)
        bound, tensors, asked = program.tensor_of_placeholder, program.tensors, dict[str, str]()
        tied: dict[Any, Node] = {}
        for node in program.graph.nodes:
            walk.node = node
            if node.op == "placeholder":
                value = node.meta.get("val")
                dims = [new_dim(walk.size(s)) for s in value.shape] if isinstance(value, Tensor) else None
                walk.dims[node] = dims
                if node.name not in bound:
                    walk.freeze(dims, "graph input")
                elif dims is not None:
                    tensor = tensors[bound[node.name]]
                    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else node.name
                    for a, b in zip(dims, walk.dims[tied.setdefault(key, node)], strict=True):
                        walk.unify(a, b)
            elif node.op == "call_function":
                walk.dims[node] = _apply_rule(walk, node, asked)
            elif node.op == "output":
                for out in node.all_input_nodes:
                    walk.freeze(walk.dims[out], "graph output")
            else:
                walk.dims[node] = None
        return program.but(axes=walk.axes())


def _apply_rule(walk: Walk, node: Node, asked: dict[str, str]) -> Any:
    """The dims of a node's output, as its op's rule says; frozen where there is none.

    asked   namespace -> what is wrong with the rules that plugins have for it: each is asked once a walk
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor | list | tuple):
        return None
    if node.target is operator.getitem:
        source, index = walk.dims[node.all_input_nodes[0]], node.args[1]
        known = isinstance(source, Multi) and isinstance(index, int)
        return source[index] if known else walk.fresh("item of an unknown op")
    function = RULES.get(op_name(node))
    if function is None and torch.Tag.pointwise in getattr(node.target, "tags", ()) and _functional(node):
        function = RULES["pointwise"]
    broken = ""
    if function is None:
        namespace = node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else "aten"
        if namespace not in asked:
            asked[namespace] = plugins.load_rules(namespace)
        broken = asked[namespace]
        function = RULES.get(op_name(node))
    if function is None:
        walk.unknown[str(node.target)] += 1
        return _freeze_all(walk, node, f"no axis rule for {node.target}" + (f" ({broken})" if broken else ""))
    try:
        out = function(walk, Args(node, walk.dims))
    except Conflict as conflict:
        walk.conflicts.append((node.name, str(conflict)))
        return _freeze_all(walk, node, f"{op_name(node)}: {conflict}")
    if isinstance(value, Tensor) and [total(d) for d in out] != walk.shape(node):
        raise InternalError(
            f"the rule for {node.target} says {[total(d) for d in out]} at {node.name}, "
            f"the graph has {walk.shape(node)}"
        )
    return out


def _freeze_all(walk: Walk, node: Node, why: str) -> Any:
    for source in node.all_input_nodes:
        walk.freeze(walk.dims[source], why)
    return walk.fresh(why)


def _functional(node: Node) -> bool:
    """In-place ops that survived clean-up have other readers of the tensor they write: nothing is known of those."""
    return not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
