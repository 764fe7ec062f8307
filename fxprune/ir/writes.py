"""Which inputs of a graph its own ops write into: values that a run would leave changed."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

_MAY_BE_ITSELF = frozenset({"to", "contiguous", "reshape", "reshape_as", "flatten", "type_as", "float", "expand_as"})
"""Composite ops that hand back their first argument, or a view of it, where there is nothing to do."""


def find_written_inputs(graph: Graph) -> dict[str, Node]:
    """Placeholder -> the first node that writes into its memory, directly or through views of it.

    A view may be taken for one where it is a copy: at worst a value is copied for nothing.
    """
    found: dict[str, Node] = {}
    for node in graph.nodes:
        for target in _targets(node):
            for source in _sources(target):
                found.setdefault(source.name, node)
    return found


def _targets(node: Node) -> Iterator[Node]:
    """The arguments that an op writes into."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value: Any = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node))


def _sources(node: Node) -> Iterator[Node]:
    """The placeholders whose memory ``node`` may be a view of."""
    seen, todo = set[Node](), [node]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if here.op == "placeholder":
            yield here
        elif here.op == "call_function" and _may_share(here):
            todo += here.all_input_nodes


def _may_share(node: Node) -> bool:
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    return schema.name.split("::")[-1] in _MAY_BE_ITSELF or any(r.alias_info is not None for r in schema.returns)
