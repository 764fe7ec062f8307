"""Names of weights from the paths of the nodes that read them, so that groups and reports read like the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .graph import Graph, Node
from .prepare import LINEAR, TURNED
from .table import TRANSLATIONS

_SLOTS: Mapping[str, tuple[str, ...]] = {
    LINEAR: ("", "weight", "bias"),
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Gemm": ("weight", "weight", "bias"),
    "MatMul": ("weight", "weight"),
    "Einsum": ("weight", "weight", "weight"),
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "LayerNormalization": ("", "weight", "bias"),
    "InstanceNormalization": ("", "weight", "bias"),
    "GroupNormalization": ("", "weight", "bias"),
    "RMSNormalization": ("", "weight"),
    "SimplifiedLayerNormalization": ("", "weight"),
    "com.microsoft::SkipLayerNormalization": ("", "", "weight", "bias", "skip_bias"),
    "com.microsoft::BiasGelu": ("", "bias"),
    "com.microsoft::FastGelu": ("", "bias"),
    "Gather": ("weight",),
    "PRelu": ("", "weight"),
    "Add": ("bias", "bias"),
    "Sub": ("bias", "bias"),
    "Mul": ("scale", "scale"),
    "Div": ("scale", "scale"),
}
_STATISTICS = ("running_mean", "running_var")
_LAYERS = frozenset({"weight"})
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)+")  # what PyTorch calls a parameter


@dataclass(frozen=True)
class Held:
    """How the module holds a constant: under which path, and whether it is trained."""

    path: str
    tensor: Tensor
    trained: bool


def name_constants(graph: Graph, wanted: frozenset[str]) -> dict[str, Held]:
    """Constant -> how the module holds it, for those that are ``wanted`` as tensors.

    A name that PyTorch gave stays (``encoder.layer.0.query.bias``); else it is the path of the node that reads it first
    and what the constant is to it: ``/encoder/layer.0/query/MatMul`` gives ``encoder.layer.0.query.weight``. Weights,
    biases and scales that the file keeps as initialisers are trained, statistics and tables of numbers are not.
    """
    found: dict[str, Held] = {}
    tree = _Tree()
    for node, position, name in _uses(graph):
        if name not in wanted or name in found:
            continue
        tensor, slot = graph.constants[name], _slot(node, position)
        own = name.removesuffix(TURNED)  # a copy goes by its reader
        path = tree.place(own if _DOTTED.fullmatch(own) else f"{_beside(node) or stem_of(node)}.{slot}")
        floats = tensor.is_floating_point()
        trained = floats and slot not in (*_STATISTICS, "constant") and (name in graph.trained or slot in _LAYERS)
        found[name] = Held(path, tensor, trained)
    return found


def _uses(graph: Graph) -> Iterator[tuple[Node, int, str]]:
    """(node, position, constant) wherever one is read as a tensor."""
    for node in graph.nodes:
        known = TRANSLATIONS[node.op].known
        for position, name in enumerate(node.inputs):
            if name in graph.constants and position not in known:
                yield node, position, name


def _slot(node: Node, position: int) -> str:
    slots = _SLOTS.get(node.op, ())
    return (slots[position] if position < len(slots) else "") or "constant"


def _beside(node: Node) -> str:
    """The path of a layer whose bias has kept the name that PyTorch gave it."""
    bias = node.inputs[2] if node.op in (LINEAR, "Conv") and len(node.inputs) > 2 else ""
    return bias.removesuffix(".bias") if _DOTTED.fullmatch(bias) and bias.endswith(".bias") else ""


def stem_of(node: Node) -> str:
    """The path of the module that a node belongs to.

    >>> [stem_of(Node("MatMul", n, (), ())) for n in ("/layer.0/query/MatMul", "/net/net.1/Conv", "a/dense/MatMul;x")]
    ['layer.0.query', 'net.1', 'a.dense']
    """
    if node.scope:
        return ".".join(re.sub(r"\W", "_", p) for p in node.scope.split("."))
    steps = [s for s in node.name.partition(";")[0].partition(":")[0].split("/") if s]
    path: list[str] = []
    for step in steps[:-1] if "/" in node.name and len(steps) > 1 else steps:  # the last says which op it is
        if path and step.startswith(f"{path[-1]}."):  # PyTorch's exporter repeats the sequence in its members
            path.pop()
        path.append(step)
    parts = [re.sub(r"\W", "_", p) for p in ".".join(path).split(".") if p]
    return ".".join(parts) or node.op.rpartition("::")[2]


class _Tree:
    """Paths that are taken: each part is a module's name or a tensor's, never both, and none that nn.Module has."""

    def __init__(self) -> None:
        self.modules, self.tensors = set[str](), set[str]()

    def place(self, wanted: str) -> str:
        """``wanted``, or the nearest to it that is free."""
        *above, last = [p if p.isdigit() or not hasattr(nn.Module(), p) else f"{p}_" for p in wanted.split(".")]
        path = ""
        for part in above:
            step = f"{path}.{part}" if path else part
            while step in self.tensors:
                step += "_"
            path = step
            self.modules.add(path)
        base = f"{path}.{last}" if path else last
        found, count = base, 0
        while found in self.tensors or found in self.modules:
            count += 1
            found = f"{base}_{count}"
        self.tensors.add(found)
        return found
