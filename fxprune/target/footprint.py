"""How much memory one sample takes: the weights, and the largest sum of values that are alive at once."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..ir.dataflow import Family, family, returns_view
from ..ir.program import Program
from ..ir.signature import dim_names, size_at, sizes_to_try

COUNTED = (
    "bytes of weights, and of the largest set of values alive at once for one sample at the example's sizes, "
    "each held from its op to its last reader; views share, nothing is fused, scratch space is not counted"
)
_VIEWS = (Family.RESHAPE, Family.PERMUTE, Family.UNIT, Family.EXPAND, Family.SAME, Family.SPLIT)


def footprint(program: Program) -> dict[str, int]:
    """``weights`` and ``activations`` in bytes. An estimate from the graph: see ``COUNTED``."""
    seen: dict[tuple[Any, ...], int] = {}
    for tensor in program.tensors.values():
        seen[tensor.data_ptr(), tuple(tensor.shape)] = tensor.nbytes
    return {"weights": sum(seen.values()), "activations": activations(program)}


def activations(program: Program) -> int:
    """Bytes of the largest set of values alive at once, see ``COUNTED``."""
    sizes = dict(sizes_to_try(program)[0])
    sizes.update({s: 1 for s, word in dim_names(program).items() if word == "batch" or word.endswith("_batch")})
    nodes = [n for n in program.graph.nodes if n.op != "output"]
    bound = program.tensor_of_placeholder
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for i, node in enumerate(program.graph.nodes):
        source = node.all_input_nodes[0] if node.all_input_nodes and _shares(node) else None
        owner[node] = node if source is None else owner[source]
        for one in (node, *node.all_input_nodes):
            last[owner[one]] = i
    ends: dict[int, list[Node]] = {}
    for node in nodes:
        if owner[node] is node:
            ends.setdefault(last[node], []).append(node)
    alive = most = 0
    for i, node in enumerate(nodes):
        if owner[node] is node and node.name not in bound:
            alive += _bytes(node, sizes)
            most = max(most, alive)
        alive -= sum(_bytes(n, sizes) for n in ends.get(i, ()) if n.name not in bound)
    return most


def _shares(node: Node) -> bool:
    """Whether what the node returns is its first input's own memory, or usually is."""
    return node.op == "call_function" and (family(node) in _VIEWS or returns_view(node))


def _bytes(node: Node, sizes: dict[str, int]) -> int:
    return sum(
        _elements(t, sizes) * t.element_size()
        for t in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(t, Tensor)
    )


def _elements(value: Tensor, sizes: dict[str, int]) -> int:
    return math.prod(size_at(size, sizes, 1) for size in value.shape)
