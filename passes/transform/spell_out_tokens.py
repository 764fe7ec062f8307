"""``SpellOutTokens``: our token ops as plain ATen, for artefacts that need nothing of us."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ...errors import InternalError
from ...ir.dataflow import op_name
from ...ir.fake_run import fake_mode_of
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild


@dataclass(frozen=True)
class SpellOutTokens(Transform):
    """Replace every ``fxprune::`` op by the nodes of its reference. The result computes the same bit for bit."""

    def run(self, program: Program) -> Program:
        from ...ops import OPS

        module = copy_graph(program.exported)
        found = [n for n in module.graph.nodes if n.op == "call_function" and op_name(n) in OPS]
        if not found:
            return program
        for node in found:
            _inline(module.graph, node, OPS[op_name(node)].reference, self.slug())
        module.graph.eliminate_dead_code()
        return program.without_facts(exported=rebuild(program.exported, module))


def _inline(graph: Graph, node: Node, reference: Any, made_by: str) -> None:
    inputs = [a for a in node.args if isinstance(a, Node)]
    if node.kwargs or len(inputs) != len(node.all_input_nodes) + len(inputs) - len(set(inputs)):
        raise InternalError(f"{node.format_node()} was not made by a transform of ours")

    def call(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return reference(*(next(given) if isinstance(a, Node) else a for a in node.args))

    with fake_mode_of(graph), enable_python_dispatcher():
        traced: GraphModule = make_fx(call, pre_dispatch=True)(*(n.meta["val"] for n in inputs))
    given, made = iter(inputs), dict[Node, Any]()
    results: Any = ()
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                made[inner] = next(given)
            elif inner.op == "output":
                results = inner.args[0]
            elif inner.op == "call_function":
                made[inner] = graph.node_copy(inner, made.__getitem__)
                made[inner].meta = {
                    "val": inner.meta["val"],
                    "stack_trace": node.meta.get("stack_trace"),
                    "fxprune_pass": made_by,
                }
            else:
                raise InternalError(f"the reference of {node.target} holds a constant tensor")
    if isinstance(results, Node):
        node.replace_all_uses_with(made[results])
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise InternalError(f"{user.format_node()} reads all results of {node.name} at once")
        user.replace_all_uses_with(made[results[user.args[1]]])
        graph.erase_node(user)
    graph.erase_node(node)
