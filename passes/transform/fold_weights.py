"""``FoldWeights``: a weight that is computed from other weights is computed once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from ...ir.constants import constant_nodes, evaluate
from ...ir.dataflow import (
    ELEMENTWISE,
    MULTIPLIES,
    VIEWS,
    Family,
    bind,
    family,
    is_mutable,
    op_name,
    product,
    returns_view,
)
from ...ir.fake_run import fake_mode_of
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

MOVES = VIEWS | ELEMENTWISE | {Family.JOIN, Family.REPEAT, Family.SHIFT, Family.SPLIT, Family.DROPOUT}
"""Besides what torch says is a view: what moves elements and mixes none of them, as ``index_select`` does."""


@dataclass(frozen=True)
class FoldWeights(Transform):
    """Replace what makes a layer's weight by the weight itself, where making it mixes elements.

    Weight standardisation (BiT, NFNet), weight and spectral normalisation, cosine classifiers: their sums run over the
    very elements that pruning removes, so nothing could be cut. Computed once, the weight is a parameter like any
    other: it can be cut exactly, it trains, and a call no longer computes it. Views, casts and element-wise ops stay as
    they are, and so do networks that make a table: axes pass through those.

    The outputs stay the same. What was folded is told in ``program.notes``.
    """

    def run(self, program: Program) -> Program:
        made = _find_weight_nodes(program)
        chosen = list(dict.fromkeys(n for node in program.graph.nodes for n in _weights(node, made)))
        if not chosen:
            return program
        module, bound = copy_graph(program.exported), program.tensor_of_placeholder
        parameters = set(program.exported.graph_signature.inputs_to_parameters)
        nodes = {n.name: n for n in module.graph.nodes}
        read = [n for n in module.graph.nodes if n.op == "placeholder" and n.name in bound and n.users]
        folded: list[tuple[Node, Node, Tensor]] = []  # the new placeholder, the one it is named after, its value
        for old, value in evaluate(program, chosen).items():
            source = nodes[_source(old, parameters, value.numel()).name]
            folded.append((_placeholder(module.graph, source, value), source, value))
            nodes[old.name].replace_all_uses_with(folded[-1][0])
        module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or is_mutable(n))
        state, specs = dict(program.exported.state_dict), list(program.exported.graph_signature.input_specs)
        gone = [n for n in read if not n.users]
        for node in gone:
            state.pop(bound[node.name], None)
        for new, source, value in folded:
            name, trained = bound[source.name], program.tensors[bound[source.name]].requires_grad
            while name in state:
                name += "_folded"
            state[name] = torch.nn.Parameter(value, requires_grad=trained)
            at = [_name(s) for s in specs].index(source.name)
            specs.insert(at + 1, InputSpec(InputKind.PARAMETER, TensorArgument(new.name), name))
        for node in gone:
            module.graph.erase_node(node)
        signature = ExportGraphSignature(specs, list(program.exported.graph_signature.output_specs))
        exported = rebuild(program.exported, module, state_dict=state, signature=signature)
        told = f"weights made of other weights, computed once instead of at every call: {len(folded)}"
        return program.without_facts(exported=exported, notes=(*program.notes, told))


class _How(IntEnum):
    """How a value is made of weights alone."""

    MOVED = 0  # views, casts, element-wise ops
    MIXED = 1  # sums, norms, statistics run over its elements
    MULTIPLIED = 2  # by a product: it may be the table that a network makes


def _weights(node: Node, made: Mapping[Node, _How]) -> Iterator[Node]:
    """Arguments to fold: the weight of a layer, or a matrix that a plain product multiplies with something else."""
    by = product(node)
    if by is not None and by.right == "weight":
        weight = bind(node)["weight"]
        if isinstance(weight, Node) and made.get(weight, _How.MOVED) != _How.MOVED:
            yield weight
    elif family(node) in MULTIPLIES and node not in made:
        for one in node.all_input_nodes:
            if made.get(one) == _How.MIXED and len(one.meta["val"].shape) == 2:
                yield one


def _find_weight_nodes(program: Program) -> dict[Node, _How]:
    """Nodes that depend on parameters and on no input, and the strongest thing that happens on the way."""
    parameters = program.exported.graph_signature.inputs_to_parameters
    constant, found = constant_nodes(program), dict[Node, _How]()
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or node not in constant:
            continue
        if any(n.name in parameters or n in found for n in inputs):
            found[node] = max(_how(node), *(found.get(n, _How.MOVED) for n in inputs))
    return found


def _how(node: Node) -> _How:
    does = family(node)
    if does in MULTIPLIES:
        return _How.MULTIPLIED
    moved = does in MOVES or op_name(node) == "index_select" or returns_view(node)
    return _How.MOVED if moved else _How.MIXED


def _source(node: Node, parameters: Collection[str], size: int) -> Node:
    """The parameter whose name the folded weight takes: of its size if there is one, else the largest."""
    seen, queue = {node}, [node]
    while queue:
        for one in queue.pop().all_input_nodes:
            if one not in seen:
                seen.add(one)
                queue.append(one)
    found = sorted((n for n in seen if n.name in parameters), key=lambda n: n.name)
    return max(found, key=lambda n: (n.meta["val"].numel() == size, n.meta["val"].numel()))


def _placeholder(graph: Graph, source: Node, value: Tensor) -> Node:
    with graph.inserting_after(source):
        node = graph.placeholder(f"{source.name}_folded")
    node.meta["val"] = fake_mode_of(graph).from_tensor(value, static_shapes=True)
    return node


def _name(spec: InputSpec) -> str:
    return str(spec.arg.name)
