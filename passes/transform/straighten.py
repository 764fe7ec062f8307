"""Indices that are constants: ``x[..., [3], :]`` is the slice ``x[..., 3:4, :]`` in disguise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten


def straighten(graph: Graph, constants: Mapping[str, Any]) -> bool:
    """Replace indexing by a constant run of neighbours (``[4]``, ``[2, 3, 4]``) by a slice; True when there was one.

    constants   placeholder name -> tensor, for those that no checkpoint changes (literals in the model's code)

    A slice cuts an axis in two, and both parts stay prunable; an index makes every element of it special. A slice is a
    view, so this is only for graphs without in-place writes.
    """
    changed = False
    for node in list(graph.nodes):
        found = _match_index(node)
        if found is None:
            continue
        source, position, index = found
        run = _run(constants.get(index.name), source.meta["val"].shape[position])
        if run is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(aten.slice.Tensor, (source, position, *run))
        new.meta = {**node.meta, "fxprune_pass": "clean"}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        changed = True
    return changed


def _match_index(node: Node) -> tuple[Node, int, Node] | None:
    """(tensor, position, index) where exactly one dim is indexed by a tensor."""
    if node.target is aten.index_select.default:
        source, position, index = node.args
        return (source, position % source.meta["val"].dim(), index) if isinstance(index, Node) else None  # type: ignore[return-value, union-attr]
    if node.target is not aten.index.Tensor:
        return None
    source, indices = node.args
    given = [(i, t) for i, t in enumerate(indices) if t is not None]  # type: ignore[arg-type]
    return (source, *given[0]) if len(given) == 1 else None  # type: ignore[return-value]


def _run(index: Any, size: Any) -> tuple[int, int] | None:
    """Start and end of the neighbours that a one-dimensional integer ``index`` lists in order."""
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        return None
    if not isinstance(size, int) or index.is_meta or not 0 < index.numel() <= size:
        return None
    values = [i + size if i < 0 else i for i in index.tolist()]
    neighbours = values == list(range(values[0], values[0] + len(values)))
    return (values[0], values[-1] + 1) if neighbours and values[0] >= 0 and values[-1] < size else None
