"""Removing a branch of which nothing stays: what it added becomes the bias of the projection that closed it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import PlanError
from ...ir.axes import Axes
from ...ir.axis import Axis, Dims, atoms, leaves
from ...ir.dataflow import find_bias

aten = torch.ops.aten


def drop_branches(module: GraphModule, axes: Axes, empty: set[Axis], tensors: Container[str], made_by: str) -> None:
    """Replace, in place, every linear layer that sums over an emptied axis, and erase what only fed it.

    tensors: names of the placeholders that stand for parameters and buffers (user inputs always stay).

    A sum over nothing is zero, so ``linear`` leaves its bias, broadcast to the shape it had. An empty dimension would
    be legal in PyTorch, but ``reshape`` with -1 is not defined on it and ONNX reads 0 as "copy the size".
    """
    if not empty:
        return
    by_name = {n.name: n for n in module.graph.nodes}

    def dead(node: Node) -> bool:
        dims = axes.dims.get(node.name)
        return isinstance(dims, list) and any(_only(d, empty) for d in dims if isinstance(d, tuple))

    used = [n for n in module.graph.nodes if n.op == "placeholder" and n.name in tensors and n.users]
    for contraction in axes.contractions:
        node = by_name[contraction.node]
        if _only(contraction.dim, empty) and not dead(node):
            _replace_by_bias(module, node, axes, dead, made_by)
    # attention counts as random for fx (it may drop out); in evaluation form nothing but inputs and output must stay
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for node in used:  # weights of the branch, and of the norm in front of it
        if not node.users:
            module.graph.erase_node(node)


def _only(dim: tuple[Axis, ...], empty: set[Axis]) -> bool:
    """True when an emptied axis is a factor of ``dim``: then no element of it is left."""
    found = list(leaves(dim))
    return any(a in empty for a in atoms(dim)) or (bool(found) and all(a in empty for a in found))


def _replace_by_bias(module: GraphModule, node: Node, axes: Axes, dead: Any, made_by: str) -> None:
    bias = find_bias(node)
    like = _same_shape(module, node, axes, dead)
    with module.graph.inserting_before(node):
        value = module.graph.call_function(aten.zeros_like.default, (like,), {"dtype": node.meta["val"].dtype})
        made = [value]
        if bias is not None:
            value = module.graph.call_function(aten.add.Tensor, (value, bias))
            made.append(value)
    for new in made:
        new.meta.update(val=node.meta["val"], stack_trace=node.meta.get("stack_trace"), fxprune_pass=made_by)
    node.replace_all_uses_with(value)


def _same_shape(module: GraphModule, node: Node, axes: Axes, dead: Any) -> Node:
    """The nearest earlier live tensor of the same dims, best one that others read too: the residual stream."""
    want = [atoms(d) for d in axes.dims[node.name]]
    found: Node | None = None
    for candidate in module.graph.nodes:
        if candidate is node:
            break
        dims: Dims | None = axes.dims.get(candidate.name)
        if (
            isinstance(candidate.meta.get("val"), Tensor)
            and dims is not None
            and not dead(candidate)
            and [atoms(d) for d in dims] == want
        ):
            found = candidate if found is None or len(candidate.users) > 1 or len(found.users) == 1 else found
    if found is None:
        raise PlanError(
            "a branch cannot be dropped",
            where=node.name,
            why="no other tensor has the shape it adds to",
            cure="keep at least one element of it",
        )
    return found
