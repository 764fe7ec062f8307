"""``PropagateAxes``: what every tensor dimension of the graph is made of."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ... import plugins
from ...errors import FxpruneError
from ...ir.axis import Conflict, Dim, new_dim, real_size, total
from ...ir.dataflow import ELEMENTWISE, family, op_name
from ...ir.flops import count_by_torch
from ...ir.pipeline import Analysis
from ...ir.program import Program
from ...ir.provenance import first_line
from . import rules  # noqa: F401  (fills RULES)
from .hidden_means import keep_divisors
from .walk import RULES, Args, Multi, Rule, Walk


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
        failed = (f"{why} at {node}: what it touches is left alone" for node, why in walk.failed)
        program = program.but(axes=walk.axes(), notes=tuple(dict.fromkeys([*program.notes, *failed])))
        return program.but(axes=keep_divisors(program))


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
    function = _rule_of(node)
    broken = ""
    if function is None:
        namespace = node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else "aten"
        if namespace not in asked:
            asked[namespace] = plugins.load_rules(namespace)
        broken = asked[namespace]
        function = _rule_of(node)
    if function is None:
        walk.unknown[str(node.target)] += 1
        return _freeze_all(walk, node, f"no axis rule for {node.target}" + (f" ({broken})" if broken else ""))
    try:
        return walk.as_captured(function(walk, Args(node, walk.dims)))
    except Conflict as conflict:
        walk.conflicts.append((node.name, str(conflict)))
        why = f"{op_name(node)}: {conflict}"
    except FxpruneError:
        raise
    except Exception as error:  # a rule may fail in any way: then nothing is known of its op
        why = f"the axis rule for {node.target} failed ({first_line(error)})"
        walk.failed.append((node.name, why))
    walk.take_back()
    return _freeze_all(walk, node, why)


def _rule_of(node: Node) -> Rule | None:
    """That of its op by name, or the one for all that is element-wise."""
    return RULES.get(op_name(node)) or (RULES["pointwise"] if family(node) in ELEMENTWISE else None)


def _freeze_all(walk: Walk, node: Node, why: str) -> Any:
    """New frozen dims for an op that nothing is known of; it costs what torch counts, whatever is cut."""
    for source in node.all_input_nodes:
        walk.freeze(walk.dims[source], why)
    count = count_by_torch(node, walk.size)
    if count:
        batch = _batch_of(walk, node)
        samples = real_size(total(batch), walk.size.example)
        if count % samples:
            batch, samples = (), 1
        walk.matmul([batch], (), (), new_dim(count // samples))
    return walk.fresh(why)


def _batch_of(walk: Walk, node: Node) -> Dim:
    """The batch of the program, where ``node`` reads something whose size depends on it."""
    inputs = set(walk.program.user_inputs)
    first = (d[0] for n, d in walk.dims.items() if n.op == "placeholder" and n.name in inputs and d)
    batch: Dim = next((dim for dim in first if walk.size.symbols(total(dim))), ())
    symbols = walk.size.symbols(total(batch))
    values = pytree.tree_leaves([n.meta.get("val") for n in node.all_input_nodes])
    sizes = (walk.size(s) for v in values if isinstance(v, Tensor) for s in v.shape)
    return batch if any(walk.size.symbols(size) & symbols for size in sizes) else ()
