"""A graph made ready: products with constant matrices become linear layers, constants lie as layers hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .graph import Graph, Node, find_needed
from .known import of_tensor
from .machine import compute
from .patterns import fuse
from .table import TRANSLATIONS, Op

LINEAR = "fxprune::Linear"
_FOLDED = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Neg", "Sqrt", "Reciprocal"})
"""Ops that make no more of a constant than it was: done once, here."""
TURNED = "::turned"
"""Behind the name of a matrix that is held the other way round."""
OWN = "::own"
"""Behind the name of a row that several nodes read: each but the first has a copy."""


def prepare(graph: Graph) -> Graph:
    """The same computation with linear layers in place of products, norms and GELUs in one piece, and constants folded
    that only move or convert."""
    graph = fuse(_fold(_with_linears(graph)))
    graph = _own_rows(_with_linears(graph))
    nodes = find_needed(graph.nodes, graph.outputs)
    read = {name for node in nodes for name in node.inputs}
    return replace(graph, nodes=nodes, constants={n: t for n, t in graph.constants.items() if n in read})


def _with_linears(graph: Graph) -> Graph:
    """``MatMul`` with a constant matrix, the ``Add`` of a constant row behind it, and ``Gemm`` of one as linear layers:
    a matrix [in, out] is held as [out, in]. A constant that only was turned for the product is taken as it was."""
    constants, trained = dict(graph.constants), set(graph.trained)
    made_by = {o: node for node in graph.nodes for o in node.outputs}
    readers = graph.readers()
    nodes = dict(enumerate(graph.nodes))
    place = {id(node): i for i, node in nodes.items()}
    for i, node in list(nodes.items()):
        found = _product(node, constants, made_by)
        if found is None:
            continue
        x, name, turned, bias = found
        if turned:
            other = name + TURNED
            if other not in constants:
                constants[other] = constants[name].t().contiguous()
            trained |= {other} if name in trained else set()
            name = other
        inputs, outputs = [x, name], node.outputs
        behind = readers.get(outputs[0], [])
        if bias is not None:
            inputs.append(bias)
        elif len(behind) == 1 and outputs[0] not in graph.outputs:
            added = _bias_of(behind[0], outputs[0], constants, constants[name].shape[0])
            if added is not None:
                inputs.append(added)
                outputs = behind[0].outputs
                nodes.pop(place[id(behind[0])])
        nodes[i] = Node(LINEAR, node.name, tuple(inputs), outputs, scope=node.scope)
    for node in nodes.values():  # rows of one bias lie in [1, out]
        if node.op == LINEAR and len(node.inputs) == 3 and constants[node.inputs[2]].dim() != 1:
            constants[node.inputs[2]] = constants[node.inputs[2]].reshape(-1)
    ordered = tuple(nodes[i] for i in sorted(nodes))
    return replace(graph, nodes=ordered, constants=constants, trained=frozenset(trained))


def _product(
    node: Node, constants: Mapping[str, Tensor], made_by: Mapping[str, Node]
) -> tuple[str, str, bool, str | None] | None:
    """(input, matrix, whether it lies as [in, out], bias) of a node that is a linear layer."""
    if node.op == "MatMul":
        x, name = node.inputs
        bias = None
        turned = True
    elif node.op == "Gemm":
        plain = node.attributes.get("alpha", 1.0) == 1 and node.attributes.get("beta", 1.0) == 1
        if not plain or node.attributes.get("transA", 0):
            return None
        x, name = node.inputs[:2]
        turned = not node.attributes.get("transB", 0)
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] else None
    else:
        return None
    maker = made_by.get(name)
    if maker is not None and maker.op == "Transpose" and tuple(maker.attributes.get("perm", (1, 0))) == (1, 0):
        name, turned = maker.inputs[0], not turned
    if name not in constants or constants[name].dim() != 2 or not constants[name].is_floating_point():
        return None
    out = constants[name].shape[1 if turned else 0]
    if bias is not None and (bias not in constants or not _is_row(constants[bias], out)):
        return None
    return x, name, turned, bias


def _bias_of(node: Node, product: str, constants: Mapping[str, Tensor], out: int) -> str | None:
    if node.op != "Add":
        return None
    other = node.inputs[1] if node.inputs[0] == product else node.inputs[0]
    return other if other in constants and constants[other].dim() == 1 and _is_row(constants[other], out) else None


def _is_row(tensor: Tensor, out: int) -> bool:
    return tensor.numel() == out and tensor.dim() in (1, 2) and tensor.shape[-1] == out


def _fold(graph: Graph) -> Graph:
    """The graph without nodes that only turn, reshape or convert constants."""
    constants, trained, nodes = dict(graph.constants), set(graph.trained), list[Node]()
    for node in graph.nodes:
        read = [name for name in node.inputs if name]
        if node.op not in _FOLDED or not all(name in constants for name in read) or node.outputs[0] in graph.outputs:
            nodes.append(node)
            continue
        translation = TRANSLATIONS[node.op]
        args = [
            None if not n else of_tensor(constants[n]).numbers() if i in translation.known else constants[n]
            for i, n in enumerate(node.inputs)
        ]
        with torch.no_grad():
            made = compute(translation.run, Op(node, graph.opset), args, graph.path)
        constants[node.outputs[0]] = made.contiguous()
        if node.inputs[0] in trained:
            trained.add(node.outputs[0])
    return replace(graph, nodes=tuple(nodes), constants=constants, trained=frozenset(trained))


def _own_rows(graph: Graph) -> Graph:
    """The graph with a row of its own for each node that reads one: exporters keep equal biases once, and two layers
    would then have to lose the same channels."""
    constants, trained, seen = dict(graph.constants), set(graph.trained), set[str]()
    nodes = []
    for node in graph.nodes:
        inputs = list(node.inputs)
        for i, name in enumerate(inputs):
            tensor = constants.get(name)
            if tensor is None or not tensor.is_floating_point() or not 1 < tensor.numel() == max(tensor.shape):
                continue
            if name in seen:
                inputs[i] = f"{name}{OWN}{len(seen)}"
                constants[inputs[i]] = tensor.clone()
                trained |= {inputs[i]} if name in trained else set()
            seen.add(inputs[i])
        nodes.append(replace(node, inputs=tuple(inputs)))
    return replace(graph, nodes=tuple(nodes), constants=constants, trained=frozenset(trained))
