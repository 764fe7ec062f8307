"""``DropLayers``: take out the attentions, feed-forwards and whole layers that the plan says are gone."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ...ir.group import LAYERS, Switch
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild


@dataclass(frozen=True)
class DropLayers(Transform):
    """``x + f(x)`` becomes ``x``, and everything that only ``f`` needed is gone: norms, products, weights.

    Needs ``groups`` and ``plan``; gives the smaller program with its facts dropped.

    Law   the result is the dense program with the value behind each layer replaced by the one before it
    """

    needs = ("groups", "plan")

    def run(self, program: Program) -> Program:
        gone = find_gone(program)
        if not gone:
            return program
        module = copy_graph(program.exported)
        nodes = {n.name: n for n in module.graph.nodes}
        used = [n for n in module.graph.nodes if n.op == "placeholder" and n.users]
        stands_for: dict[Node, Node] = {}
        for behind, earlier in sorted((pair for part in gone for pair in part.past), key=lambda p: _place(nodes, p[0])):
            other = nodes[earlier]
            while other in stands_for:
                other = stands_for[other]
            nodes[behind].replace_all_uses_with(other)
            stands_for[nodes[behind]] = other
        # attention counts as random for fx; in evaluation form nothing but inputs and output must stay
        module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        for node in used:
            if not node.users and node.name in program.tensor_of_placeholder:
                module.graph.erase_node(node)
        return program.without_facts(exported=rebuild(program.exported, module))


def find_gone(program: Program) -> list[Switch]:
    """The layers that the program's plan says are gone."""
    plan = program.need("plan")
    layers = (g for g in program.need("groups") if isinstance(g, Switch) and g.past and str(g.kind) in LAYERS)
    return [g for g in layers if not len(plan.kept(g))]


def _place(nodes: dict[str, Node], name: str) -> int:
    return list(nodes).index(name)
