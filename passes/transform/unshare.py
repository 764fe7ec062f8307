"""``Unshare``: give every attention layer its own view of a table that all of them read.

T5 computes one relative-position bias and Llama one rotary table for the whole model. Through it, the heads (or the
query/key width) of every layer become one axis: correct, and far too coarse. An ``index_select`` with an arange of
its own in front of each reader cuts that tie. It is nothing special to slicing: the arange is a buffer like any other,
and cutting it leaves exactly the kept positions. Those that stay whole are removed again by ``FoldIndices``.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch._subclasses import FakeTensorMode
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from ...ir.axis import Axis, Dims, leaves, total
from ...ir.dataflow import Family, behind_views, family
from ...ir.fake_run import fake_mode_of
from ...ir.group import Kind
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

PREFIX = "fxprune_index_"
POSITIONAL = "values depend on position"
ATTENTION = (Kind.HEAD, Kind.KV, Kind.QUERY, Kind.QK, Kind.V, Kind.QKV)


@dataclass(frozen=True)
class Unshare(Transform):
    """Insert an index in front of each reader of a table shared by several attention layers.

    Needs ``axes`` and ``groups`` (to know which axes are tied); both are dropped when the graph changed.
    """

    needs = ("axes", "groups")

    def run(self, program: Program) -> Program:
        edges = _tying_edges(program)
        if not edges:
            return program
        module = copy_graph(program.exported)
        nodes = {n.name: n for n in module.graph.nodes}
        fake_mode = fake_mode_of(module.graph)
        state, specs = dict(program.exported.state_dict), list(program.exported.graph_signature.input_specs)
        last = next(n for n in reversed(module.graph.nodes) if n.op == "placeholder" and _is_tensor(program, n))
        made: dict[tuple[str, int, str], Node] = {}
        for edge in edges:
            source, reader = nodes[edge.source], nodes[edge.reader]
            key = (edge.source, edge.position, edge.layer)
            if key not in made:
                name = f"{PREFIX}{len(made)}"
                state[name] = torch.arange(total(edge.dim))
                last = _placeholder(module.graph, last, name, state[name], fake_mode)
                specs.insert(
                    _position(specs, module.graph, last),
                    InputSpec(InputKind.BUFFER, TensorArgument(last.name), name, persistent=True),
                )
                made[key] = _select(module.graph, reader, source, edge.position, last, self.slug())
            reader.replace_input_with(source, made[key])
        signature = ExportGraphSignature(specs, list(program.exported.graph_signature.output_specs))
        exported = rebuild(program.exported, module, state_dict=state, signature=signature)
        return program.without_facts(exported=exported)


@dataclass(frozen=True)
class _Edge:
    """``reader`` mixes the shared value ``source`` with activations; ``dim`` at ``position`` is tied."""

    source: str
    reader: str
    position: int
    dim: tuple[Axis, ...]
    layer: str


def _find_tied_axes(program: Program) -> set[Axis]:
    """Live attention axes that more than one softmax depends on."""
    axes = program.need("axes")
    live = {g.axis for g in program.need("groups") if g.prunable and g.kind in ATTENTION}
    soft = {a for dim, _ in axes.tags.get("softmax", ()) for a in leaves(dim)}
    readers: dict[Axis, set[str]] = collections.defaultdict(set)
    for product in axes.matmuls:
        around = {*leaves(product.k), *leaves(product.n), *leaves(product.m)}
        if product.form == "matmul" and soft & around:
            scores = "" if soft & set(leaves(product.k)) else product.node  # count Q x K products, one per layer
            for axis in {*around, *(a for d in product.batch for a in leaves(d))} & live:
                if scores:
                    readers[axis].add(scores)
    return {axis for axis, nodes in readers.items() if len(nodes) > 1}


def _tying_edges(program: Program) -> list[_Edge]:
    """Edges that carry a tied axis into several layers, or a position-dependent constant (ALiBi slopes) into any."""
    frontier, chosen = list(_frontier(program)), dict[_Edge, None]()
    constant = {g.axis for g in program.need("groups") if g.kind in ATTENTION and g.frozen.startswith(POSITIONAL)}
    for axis in (*_find_tied_axes(program), *constant):
        mine = [e for e in frontier if axis in set(leaves(e.dim))]
        if axis in constant and not mine:  # heads folded into the batch (Bloom): where the slopes meet the first input
            mine = [e for e in _entries(program) if axis in set(leaves(e.dim))]
            frontier += mine
        if len({e.layer for e in mine}) > 1 or axis in constant:
            chosen.update(dict.fromkeys(mine))
    return sorted(chosen, key=frontier.index)


def _entries(program: Program) -> Iterator[_Edge]:
    """Edges from what depends on no input to what does."""
    given, parameters = set(program.user_inputs), program.exported.graph_signature.inputs_to_parameters
    fed = {n for n in program.placeholders() if n.name in given}
    for node in program.graph.nodes:
        if node.op == "call_function" and any(n in fed for n in node.all_input_nodes):
            fed.add(node)
            for source in node.all_input_nodes:
                if source not in fed and source.op == "call_function" and behind_views(source).name not in parameters:
                    yield from _edges(program, source, node, "")


def _edges(program: Program, source: Node, reader: Node, layer: str) -> Iterator[_Edge]:
    """One edge for every dim of ``source`` that an index could stand in front of: it has a static length."""
    dims: Dims | None = program.need("axes").dims.get(source.name)
    for position, dim in enumerate(dims if isinstance(dims, list) else []):
        if isinstance(source.meta["val"].shape[position], int) and total(dim) > 1:
            yield _Edge(source.name, reader.name, position, dim, layer)


def _frontier(program: Program) -> Iterator[_Edge]:
    """Edges from a table, mask or angle to a node that mixes it into what was computed from the user's inputs.

    Weights may have made the table (a bias network over coordinates): what counts is that no input met a weight in it.
    """
    axes, parameters = program.need("axes"), program.exported.graph_signature.inputs_to_parameters
    products = {m.node for m in axes.matmuls}
    content: set[Node] = set()
    given = set(program.user_inputs)
    fed = {n for n in program.placeholders() if n.name in given}
    layer = ""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        # sizes of the inputs carry nothing of them
        if any(n in fed for n in inputs) and not isinstance(node.meta.get("val"), int | SymInt):
            fed.add(node)
        weights = {n for n in inputs if node.name in products and behind_views(n).name in parameters}
        weighted = node in fed and bool(weights)
        if weighted:
            layer = node.name  # readers between two weight products belong to one layer and may share an index
        embeds = family(node) is Family.TABLE and any(
            n.op == "placeholder" and n.name not in program.tensor_of_placeholder for n in inputs
        )
        if weighted or embeds or any(n in content for n in inputs):
            content.add(node)
            for source in inputs:
                if source not in content and source not in weights and source.name not in parameters:
                    yield from _edges(program, source, node, layer)


def _is_tensor(program: Program, node: Node) -> bool:
    return node.name in program.tensor_of_placeholder


def _placeholder(graph: Graph, after: Node, name: str, value: Tensor, fake_mode: FakeTensorMode) -> Node:
    with graph.inserting_after(after):
        node = graph.placeholder(f"b_{name}")
    node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
    return node


def _position(specs: list[InputSpec], graph: Graph, node: Node) -> int:
    return [n for n in graph.nodes if n.op == "placeholder"].index(node)


def _select(graph: Graph, before: Node, source: Node, position: int, index: Node, made_by: str) -> Node:
    with graph.inserting_before(before):
        node = graph.call_function(torch.ops.aten.index_select.default, (source, position, index))
    node.meta.update(val=source.meta["val"], stack_trace=before.meta.get("stack_trace"), fxprune_pass=made_by)
    return node
