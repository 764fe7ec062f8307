"""What is known of the ops through which a group passes together with a weight, and what is not."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from torch.fx import Node

from ...ir.axes import Axes
from ...ir.axis import Axis, leaves, leaves_of
from ...ir.dataflow import MULTIPLIES, behind_views, family, op_name
from ...ir.group import OpUse
from ...ir.linear_layers import layer_at
from ...ir.program import Program


def op_uses(program: Program) -> dict[Axis, tuple[OpUse, ...]]:
    """Leaf axis -> every product with a weight that it passes through, in graph order.

    An axis rule alone makes an op sliceable. Cost, importance and recovery read what else its rule states and what the
    table of ops says, so an op may well be cut and lack one of them: this is where that is seen.
    """
    facts = _Facts(program)
    found: dict[Axis, list[OpUse]] = collections.defaultdict(list)
    for node in program.graph.nodes:
        for axis, use in facts.at(node):
            found[axis].append(use)
    return {axis: tuple(uses) for axis, uses in found.items()}


class _Facts:
    def __init__(self, program: Program) -> None:
        self.axes: Axes = program.need("axes")
        self.bound = program.tensor_of_placeholder
        self.counted: dict[str, set[Axis]] = {}  # what the products of a node sum over, where it has any
        for m in self.axes.matmuls:
            self.counted.setdefault(m.node, set()).update(leaves(m.k))
        self.summed: dict[str, set[Axis]] = collections.defaultdict(set)
        self.known: dict[str, set[Axis]] = collections.defaultdict(set)  # summed over, averaged or frozen
        for c in self.axes.contractions:
            self.summed[c.node].update(leaves(c.dim))
            self.known[c.node].update(leaves(c.dim))
        for s in (*self.axes.statistics, *self.axes.frozen):
            self.known[s.node].update(leaves(s.dim))

    def at(self, node: Node) -> Iterator[tuple[Axis, OpUse]]:
        """The axes that pass through ``node``, where it is a product with a weight."""
        does, read = family(node), node.all_input_nodes
        if node.op != "call_function" or (does is not None and does not in MULTIPLIES):
            return
        if not any(behind_views(n).name in self.bound for n in read):
            return
        given = {axis for n in read for axis in leaves_of(self.axes.dims.get(n.name))}
        left = set(leaves_of(self.axes.dims.get(node.name)))
        lost = given - left - self.known[node.name]
        if does is None and not self.summed[node.name] and not lost:
            return  # nothing is summed: element by element, as far as its rule says
        layer, counted = layer_at(node, self.bound), self.counted.get(node.name)
        for axis in sorted(given | left, key=id):
            # a depthwise convolution hands its channels on
            sums = axis in self.summed[node.name] and (counted is None or axis in counted)
            yield (
                axis,
                OpUse(
                    node.name,
                    op_name(node),
                    recovery=layer if isinstance(layer, str) and (sums or axis in lost) else "",
                    cost="" if counted is not None else "its axis rule states no product (w.matmul)",
                    importance="its axis rule does not say that it sums (w.contract)" if axis in lost else "",
                ),
            )
