"""In-place ops made functional, wherever it is provable that every later reader sees the same values."""

from __future__ import annotations

import operator
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ...ir.dataflow import MULTIPLIES, NORMS, Family, family, family_of, is_mutable, is_random, op_name

aten = torch.ops.aten

FRESH = (
    MULTIPLIES | NORMS | {Family.BATCH_NORM, Family.SOFTMAX, Family.ATTENTION, Family.POOL, Family.LIKE, Family.CREATE}
)
"""Composite ops whose output never shares memory with an input. Any other may hand its input back as it is."""
SAME_TENSOR = (aten.detach.default, aten.alias.default)
SCATTER: dict[Any, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
ANY_DTYPE = (Family.SCATTER, Family.FILL)  # take indices, masks, or cast


class Aliases:
    """Which nodes may share memory, learned node by node in the order of the graph."""

    def __init__(self) -> None:
        self.seen: set[Node] = set()
        self._group: dict[Node, list[Node]] = {}
        self._view_of: dict[Node, tuple[Node, Node]] = {}  # slice -> what it is a slice of, and the node that says how

    def add(self, node: Node) -> None:
        """Meet the next node: alone, or in one group with the inputs it may share memory with."""
        self.seen.add(node)
        self._join([node, *(n for n in node.all_input_nodes if _may_return(node, n))])
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and (node.target in SCATTER or node.target in SAME_TENSOR):
            self._view_of[node] = source, node

    def group(self, node: Node) -> list[Node]:
        return self._group.get(node, [node])

    def chain(self, node: Node) -> list[Node]:
        """``node``, what it is a slice of, what that is a slice of, ..."""
        result = [node]
        while result[-1] in self._view_of:
            result.append(self._view_of[result[-1]][0])
        return result

    def how(self, node: Node) -> Node:
        """The slice or select that makes ``node`` from what it is a slice of."""
        return self._view_of[node][1]

    def renew(self, fresh: list[Node], how: list[Node]) -> None:
        """``fresh`` holds new values: a tensor, what it is a slice of, ... No other node shares their memory."""
        for node in fresh:
            self.seen.add(node)
            self._group[node] = fresh
        for (node, parent), view in zip(pairwise(fresh), how, strict=True):
            if node is not parent:
                self._view_of[node] = parent, view

    def later_readers(self, node: Node) -> list[Node]:
        return [user for user in node.users if user not in self.seen]

    def _join(self, nodes: list[Node]) -> None:
        joined = self._group.setdefault(nodes[0], [nodes[0]])
        for node in nodes[1:]:
            other = self._group.setdefault(node, [node])
            if other is joined:
                continue
            small, joined = sorted((joined, other), key=len)
            joined += small
            self._group.update(dict.fromkeys(small, joined))


def make_functional(graph: Graph, lasting: Collection[str]) -> tuple[int, list[str]]:
    """Replace the in-place ops of ``graph`` by functions. Returns how many, and a note for each that stays.

    lasting    names of the placeholders whose memory outlives a call: weights, buffers, constants

    An op that writes into ``x`` becomes a new value that all later readers of ``x`` get. When ``x`` is a slice or an
    element of another tensor, that one gets a new value too (``slice_scatter``, ``select_scatter``). The op stays as it
    is when another view of the same memory is read later, or when it writes into something lasting.
    """
    aliases, done, notes = Aliases(), 0, []
    for node in list(graph.nodes):
        if op_name(node) == "detach_":  # changes no value
            node.target = aten.detach.default
        if not is_mutable(node):
            aliases.add(node)
            continue
        why = _obstacle(node, aliases, lasting)
        if why:
            notes.append(f"{node.name} ({op_name(node)}) still writes in place: {why}")
            aliases.add(node)
        else:
            _rewrite(node, aliases)
            done += 1
    return done, notes


def _obstacle(node: Node, aliases: Aliases, lasting: Collection[str]) -> str:
    """Why ``node`` cannot become a function; empty when it can."""
    target = node.args[0] if node.args else None
    if _functional(node) is None or not isinstance(target, Node) or not isinstance(target.meta.get("val"), Tensor):
        return "the op has no functional form"
    chain = aliases.chain(target)
    for member in aliases.group(target):
        if member.op == "get_attr" or member.name in lasting:
            return f"it may write into {member.name}, which keeps its value from call to call"
        if member not in chain and any(user is not node for user in aliases.later_readers(member)):
            return f"{member.name} may share the memory and is read later"
    return ""


def _rewrite(node: Node, aliases: Aliases) -> None:
    target = node.args[0]
    assert isinstance(target, Node)
    chain = aliases.chain(target)
    later = {old: [user for user in aliases.later_readers(old) if user is not node] for old in chain}
    views = [aliases.how(slice_) for slice_ in chain[:-1]]
    with node.graph.inserting_before(node):
        made = _new_value(node, target)
        fresh = [made[-1]]
        for view, parent in zip(views, chain[1:], strict=True):
            if view.target in SAME_TENSOR:
                fresh.append(fresh[-1])
                continue
            value = node.graph.call_function(SCATTER[view.target], (parent, fresh[-1], *view.args[1:]), view.kwargs)
            value.meta = _meta(node, parent.meta["val"])
            made.append(value)
            fresh.append(value)
    for old, new in zip(chain, fresh, strict=True):
        for user in later[old]:
            user.replace_input_with(old, new)
    node.replace_all_uses_with(fresh[0])
    node.graph.erase_node(node)
    for value in made:
        aliases.add(value)
    aliases.renew(fresh, views)


def _functional(node: Node) -> OpOverload | None:
    """The overload that computes what the in-place ``node`` writes into its first argument."""
    schema = node.target._schema  # type: ignore[union-attr]
    library, _, name = schema.name.partition("::")
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if is_random(node) or torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
        return None
    if not name.endswith("_") or sum(written) != 1 or not written[0]:
        return None
    if node.target is aten.fill_.Scalar:
        return aten.full_like.default
    if node.target is aten.zero_.default:
        return aten.zeros_like.default
    packet = getattr(getattr(torch.ops, library), name[:-1], None)
    return getattr(packet, schema.overload_name or "default", None)


def _new_value(node: Node, target: Node) -> list[Node]:
    """Nodes that compute what ``node`` writes; the last one has the dtype and shape of what is overwritten."""
    own, does, graph = target.meta["val"], family_of(op_name(node).removesuffix("_")), node.graph
    functional = _functional(node)
    assert functional is not None
    value = graph.call_function(functional, node.args, node.kwargs)
    value.meta = _meta(node, own)
    others = [n.meta.get("val") for n in node.all_input_nodes if n is not target]
    dtypes = {t.dtype for t in others if isinstance(t, Tensor)}
    if does is Family.COMPARE:  # as functions these answer with booleans; in place they keep the dtype
        gives = torch.bool
    elif does in ANY_DTYPE or dtypes <= {own.dtype}:
        gives = own.dtype
    else:
        gives = torch.result_type(own, next(t for t in others if isinstance(t, Tensor)))
    if gives == own.dtype:
        return [value]
    value.meta["val"] = own.to(gives)
    cast = graph.call_function(aten.to.dtype, (value, own.dtype))
    cast.meta = _meta(node, own)
    return [value, cast]


def _meta(node: Node, value: Any) -> dict[str, Any]:
    return {**node.meta, "val": value, "fxprune_pass": "clean"}


def _may_return(node: Node, source: Node) -> bool:
    """Whether an output of ``node`` may share memory with its input ``source``."""
    if node.op != "call_function":
        return False
    given, made = source.meta.get("val"), node.meta.get("val")
    if isinstance(given, torch.SymInt | int | float | bool) or isinstance(made, torch.SymInt | int | float | bool):
        return False
    if node.target is operator.getitem:
        return not _separate(node, source)
    if not isinstance(node.target, OpOverload):
        return True
    if isinstance(given, Tensor) and isinstance(made, Tensor) and given.dtype != made.dtype:
        return "view" in op_name(node)
    if family(node) in FRESH and (op_name(node) != "einsum" or len(node.all_input_nodes) > 1):
        return False  # an einsum of one operand may be a permuted view; of several it is a product
    if node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return True
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and source in (value if isinstance(value, list | tuple) else (value,)):
            return True
    return any(a.alias_info is not None for a in node.target._schema.arguments if a.name in node.kwargs)


def _separate(item: Node, source: Node) -> bool:
    """Whether ``item`` is a result of its own of ``source`` (the values of a topk): new memory, taken out once."""
    if not isinstance(source.target, OpOverload):
        return False
    schema = source.target._schema
    new = not any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
    composite = source.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    twins = [n for n in source.users if n.target is operator.getitem and n.args[1] == item.args[1]]
    return new and not composite and twins == [item]
