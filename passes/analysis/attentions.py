"""Attentions as token sites see them: what they read, and how far their tokens reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ...ir.axis import OPEN, Dim, leaves
from ...ir.dataflow import ELEMENTWISE, VIEWS, Family, bind, family, product
from ...ir.token_flow import Positional, patches_of
from .walk import Multi

pass


@dataclass(frozen=True)
class _Attention:
    """One self-attention: its nodes, and the dim of its keys."""

    node: Node
    product: Node  # attention times values
    dim: Dim
    query: Node | None = None
    key: Node | None = None
    values: Node | None = None
    scale: float = 1.0


@dataclass
class _Reach:
    """What lies behind one value: nodes that hold its tokens, and how some of them read them."""

    nodes: set[Node] = field(default_factory=set)
    softmaxes: dict[str, int] = field(default_factory=dict)
    averages: dict[str, int] = field(default_factory=dict)
    restored: list[tuple[str, str]] = field(default_factory=list)


def _stream(dim: Dim) -> Dim:
    try:
        return patches_of(dim)[0]
    except Positional:
        return ()


def _open(dim: Dim) -> bool:
    return any(axis.size > OPEN for axis in leaves(dim)) or not _stream(dim)


def _dims(found: Any) -> Iterator[Dim]:
    if isinstance(found, tuple):
        yield found
    elif isinstance(found, list | Multi):
        for d in found:
            yield from _dims(d)


def _is_weighed(node: Node, found: _Reach) -> bool:
    """Whether what sums over tokens is weighed by a softmax over them: attention times values."""
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source.name in found.softmaxes:
            return True
        if source in found.nodes and (family(source) in MOVES | ELEMENTWISE or _is_layer(source)):
            pending += source.all_input_nodes
    return False


def _is_layer(node: Node) -> bool:
    """A product as linear layers are made of."""
    one = product(node)
    return one is not None and one.form in ("linear", "transposed")


def _right(node: Node) -> Node | None:
    """What a product of two matrices multiplies with."""
    one = product(node)
    right = bind(node)[one.right] if one is not None else None
    return right if isinstance(right, Node) else None


MOVES = VIEWS | {Family.DROPOUT, Family.EXPAND, Family.JOIN, Family.SPLIT, Family.LIKE}
