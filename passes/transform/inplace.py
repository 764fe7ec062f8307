"""In-place ops made functional, wherever it is provable that every later reader sees the same values."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten

MADE_BY = "clean"
# Composite ops whose output never shares memory with an input. Others may return their input as it is.
FRESH = {
    "linear", "matmul", "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "scaled_dot_product_attention", "softmax", "log_softmax", "max_pool2d",
    "ones_like", "zeros_like", "arange", "cross_entropy_loss", "type_as", "std", "var", "where", "one_hot",
}
# In place these keep the dtype of what they overwrite; as functions they answer with booleans.
PREDICATES = {"eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "logical_xor"}
# These change the shape of a tensor in place, or draw random numbers into it.
NOT_FUNCTIONAL = {
    "unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_", "as_strided_",
    "bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_", "log_normal_", "cauchy_",
}


def op_name(node: Node) -> str:
    """``add_`` for ``aten.add_.Tensor``; empty for what is not an overload of an operator."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, OpOverload) else ""


def is_mutable(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


class Aliases:
    """Which nodes may share memory, learned node by node in the order of the graph."""

    def __init__(self) -> None:
        self.members: dict[Node, list[Node]] = {}
        self.view: dict[Node, tuple[Node, OpOverload, tuple[Any, ...]]] = {}
        self.seen: set[Node] = set()

    def add(self, node: Node) -> None:
        """Meet the next node: alone, or in one set with the inputs it may share memory with."""
        self.seen.add(node)
        merged = [node]
        for source in _shares_memory_with(node):
            group = self.members.get(source, [source])
            if group is not merged:
                small, big = sorted((merged, group), key=len)
                big += small
                merged = big
        for member in merged if merged[-1:] != [node] or len(merged) == 1 else merged:
            self.members[member] = merged
        if node.target in (aten.slice.Tensor, aten.select.int) and not node.kwargs:
            self.view[node] = (node.args[0], node.target, tuple(node.args[1:]))  # type: ignore[assignment,arg-type]

    def replace(self, nodes: Sequence[Node], fresh: Sequence[Node]) -> None:
        """``fresh`` are the new values of ``nodes`` (a tensor, then what it is a view of, ...)."""
        for node in fresh:
            self.seen.add(node)
            self.members[node] = list(fresh)
        for old, new, parent in zip(nodes, fresh, fresh[1:], strict=False):
            self.view[new] = (parent, *self.view[old][1:])

    def read_later(self, node: Node) -> bool:
        return any(user not in self.seen for user in node.users)


def make_functional(graph: Graph) -> tuple[int, list[str]]:
    """Replace in-place ops of ``graph`` by functions. Returns how many, and why some stay.

    An op that writes into ``x`` becomes a new value that all later readers of ``x`` get. When ``x`` is a slice or an
    element of another tensor, that one gets a new value too (``slice_scatter``, ``select_scatter``). The op stays as it
    is when another view of the same memory is read later, or when it writes into a weight, buffer or constant.
    """
    aliases, done, notes = Aliases(), 0, []
    for node in list(graph.nodes):
        if is_mutable(node):
            why = _rewrite(node, aliases)
            if why:
                notes.append(f"{node.name} ({op_name(node)}) still writes in place: {why}")
            else:
                done += 1
                continue
        aliases.add(node)
    return done, notes


def _rewrite(node: Node, aliases: Aliases) -> str:
    """Make ``node`` functional, or say why not."""
    name = op_name(node)
    if name == "detach_":  # changes no value
        node.target = aten.detach.default
        aliases.add(node)
        return ""
    functional = _functional(node)
    target = node.args[0] if node.args else None
    if functional is None or not isinstance(target, Node):
        return "the op has no functional form"
    chain = [target]
    while chain[-1] in aliases.view:
        chain.append(aliases.view[chain[-1]][0])
    base = chain[-1]
    for member in aliases.members.get(target, [target]):
        if member not in chain and aliases.read_later(member):
            return f"{member.name} shares the memory and is read later"
        if member.op in ("placeholder", "get_attr") and not _is_input(member):
            return f"it writes into {member.name}, which keeps the value from call to call"
    if len(chain) > 1 and not all(_plain_view(aliases.view[c]) for c in chain[:-1]):
        return f"{target.name} is no simple slice of {base.name}"
    value = _new_value(node, functional, target)
    fresh = [value]
    with node.graph.inserting_after(value):
        for old, parent in zip(chain, chain[1:], strict=False):
            _, view, args = aliases.view[old]
            scatter = aten.slice_scatter.default if view is aten.slice.Tensor else aten.select_scatter.default
            made = node.graph.call_function(scatter, (parent, fresh[-1], *args))
            made.meta = _meta(node, parent)
            node.graph._insert = made.append
            fresh.append(made)
    for old, new in zip(chain, fresh, strict=True):
        for user in list(old.users):
            if user not in aliases.seen and user not in fresh and user is not node:
                user.replace_input_with(old, new)
    if value is not node:
        node.replace_all_uses_with(value)
        node.graph.erase_node(node)
    aliases.replace(chain, fresh)
    return ""


def _new_value(node: Node, functional: OpOverload, target: Node) -> Node:
    """The node that computes what ``node`` writes, with the dtype and shape of what it overwrites."""
    own, name = target.meta["val"], op_name(node)
    others = [a.meta["val"] for a in node.all_input_nodes[1:] if isinstance(a.meta.get("val"), Tensor)]
    graph = node.graph
    if name == "copy_":
        source = node.args[1]
        assert isinstance(source, Node)
        given = source.meta["val"]
        if given.shape == own.shape and given.dtype == own.dtype and given.device == own.device:
            with graph.inserting_before(node):
                value = graph.call_function(aten.clone.default, (source,))
            value.meta = _meta(node, target)
            return value
    if name in ("fill_", "zero_") and functional in (aten.full_like.default, aten.zeros_like.default):
        node.target = functional
    node.target = functional
    casts = name.rstrip("_") in PREDICATES and own.dtype is not torch.bool
    if not casts and all(o.dtype == own.dtype or name in ("index_put_", "masked_fill_", "copy_") for o in others):
        return node
    with graph.inserting_after(node):
        value = graph.call_function(aten.to.dtype, (node, own.dtype))
    value.meta = _meta(node, target)
    node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
    return value
