"""Layer norms and GELUs that older exporters wrote out op by op, as the one op that they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .graph import Graph, Node

_CLOSE = 1e-4


@dataclass(frozen=True)
class _Reader:
    """A graph, read from a value to the one node that takes it on."""

    constants: Mapping[str, Tensor]
    readers: Mapping[str, list[Node]]
    outputs: tuple[str, ...]

    def only(self, value: str, op: str) -> Node | None:
        """The one node that reads ``value``, if it is of this op."""
        found = self.readers.get(value, [])
        return found[0] if len(found) == 1 and found[0].op == op and value not in self.outputs else None

    def other(self, node: Node, value: str) -> str:
        """What a node of two inputs reads beside ``value``."""
        return node.inputs[1] if node.inputs[0] == value else node.inputs[0]

    def number(self, name: str) -> float | None:
        """The value of a constant of one element."""
        tensor = self.constants.get(name)
        return None if tensor is None or tensor.numel() != 1 else float(tensor)

    def behind(self, value: str, op: str, number: float) -> str | None:
        """The value behind the one node of this op that combines ``value`` with this number."""
        node = self.only(value, op)
        if node is None:
            return None
        found = self.number(self.other(node, value))
        return node.outputs[0] if found is not None and abs(found - number) < _CLOSE else None

    def row(self, name: str) -> bool:
        """Whether a constant is one row."""
        return name in self.constants and self.constants[name].dim() == 1

    def averages(self, node: Node) -> bool:
        """Whether a node takes the mean over the last dimension, which stays as one of size 1."""
        axes = node.attributes.get("axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1] in self.constants:
            axes = tuple(self.constants[node.inputs[1]].flatten().tolist())
        return node.op == "ReduceMean" and axes == (-1,) and bool(node.attributes.get("keepdims", 1))


def fuse(graph: Graph) -> Graph:
    """The same computation with ``LayerNormalization`` and ``Gelu`` where their formulas stand, and nothing else reads
    what lies in between."""
    read = _Reader(graph.constants, graph.readers(), graph.outputs)
    last: dict[str, Node] = {}  # the value that a formula ends in -> the op that it is
    for node in graph.nodes:
        made = (
            _norm(read, node) if node.op == "ReduceMean" else _gelu(read, node) if node.op in ("Div", "Mul") else None
        )
        if made is not None:
            last[made.outputs[0]] = made
    nodes = tuple(last.get(node.outputs[0], node) for node in graph.nodes)
    return replace(graph, nodes=nodes)


def _norm(read: _Reader, mean: Node) -> Node | None:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias, whose first node is ``mean``."""
    x = mean.inputs[0]
    minus = read.only(mean.outputs[0], "Sub")
    if not read.averages(mean) or minus is None or minus.inputs[0] != x:
        return None
    centred, found = minus.outputs[0], read.readers.get(minus.outputs[0], [])
    squares = [n for n in found if n.op in ("Pow", "Mul")]
    divided = [n for n in found if n.op == "Div" and n.inputs[0] == centred]
    if not squares or len(divided) != 1 or len({n.outputs[0] for n in found}) != 2 or centred in read.outputs:
        return None
    square = squares[0]
    twice = square.inputs == (centred, centred) if square.op == "Mul" else read.number(square.inputs[1]) == 2
    variance = read.only(square.outputs[0], "ReduceMean")
    if not twice or variance is None or not read.averages(variance):
        return None
    more = read.only(variance.outputs[0], "Add")
    epsilon = None if more is None else read.number(read.other(more, variance.outputs[0]))
    root = None if more is None else read.only(more.outputs[0], "Sqrt")
    if epsilon is None or root is None or divided[0].inputs[1] != root.outputs[0]:
        return None
    if len(read.readers.get(root.outputs[0], [])) != 1 or root.outputs[0] in read.outputs:
        return None
    scaled = read.only(divided[0].outputs[0], "Mul")
    weight = "" if scaled is None else read.other(scaled, divided[0].outputs[0])
    if scaled is None or not read.row(weight):
        return None
    moved = read.only(scaled.outputs[0], "Add")
    bias = "" if moved is None else read.other(moved, scaled.outputs[0])
    end = moved if moved is not None and read.row(bias) else scaled
    inputs = (x, weight, bias) if end is moved else (x, weight)
    attributes = {"axis": -1, "epsilon": epsilon}
    return Node("LayerNormalization", scaled.name, inputs, end.outputs, attributes, scaled.scope)


def _gelu(read: _Reader, node: Node) -> Node | None:
    """0.5 * x * (1 + erf(x / sqrt(2))), whose first node is ``node``."""
    x = node.inputs[0]
    by = read.number(node.inputs[1]) if len(node.inputs) > 1 else None
    wanted = math.sqrt(2) if node.op == "Div" else math.sqrt(0.5)
    error = read.only(node.outputs[0], "Erf")
    if by is None or abs(by - wanted) > _CLOSE or error is None:
        return None
    one = read.behind(error.outputs[0], "Add", 1.0)
    product = None if one is None else read.only(one, "Mul")
    if one is None or product is None:
        return None
    beside = read.other(product, one)
    if beside == x:
        end = read.behind(product.outputs[0], "Mul", 0.5)
    else:
        half = [n for n in read.readers.get(x, []) if n.op == "Mul" and n.outputs[0] == beside]
        known = half and read.number(read.other(half[0], x)) == 0.5 and len(read.readers.get(beside, [])) == 1
        end = product.outputs[0] if known else None
    return None if end is None else Node("Gelu", node.name, (x,), (end,), {}, node.scope)


_FIRST = {"ReduceMean": _norm, "Div": _gelu, "Mul": _gelu}
"""Op that a formula begins with -> what reads the formula."""
