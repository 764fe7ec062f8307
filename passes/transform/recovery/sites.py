"""Where recovery applies: the layers that read a cut axis, what their output is added to, and the norm behind that."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ....ir.axes import Axes
from ....ir.axis import Axis, Dim, Dims, Keep, element_of, kept_index, kept_total, leaves, real_size, total
from ....ir.dataflow import ROW_NORMS, Family, bind, family, goes_to, op_name
from ....ir.linear_layers import Layer, layer_at
from ....ir.norms import row_norm_at
from ....ir.program import Program
from .depthwise import is_depthwise

WIDEST = 16384  # outputs of a layer that is refit only because of what it reads: vocabularies are left alone
KEEPING = ROW_NORMS | {Family.DROPOUT, Family.SAME, Family.COPY, Family.CAST}
"""Ops that work on every token by itself and keep its place."""


@dataclass(frozen=True)
class Site:
    """One layer whose weights recovery may change.

    node     the layer in the dense graph;  start: the node that gives its output in the pruned graph
    reads    True: it sums over a cut axis, or reads what changed before it and joins a residual stream (target: the sum
             that its output goes into); False: it projects what changed before it (target: its own dense output)
    operand, weight, bias   argument and placeholders; bias is "" where there is none. Where a convolution has none and
             a batch norm with running statistics alone reads it, its running mean takes the bias's place: less of that
             is more of a bias (``sign`` -1)
    form     ``linear`` [o, k], ``transposed`` [k, o], ``conv`` [o, c, ..kernel] or ``depthwise`` [c, 1, ..kernel]
    path     the nodes from its output to ``target``, the last sum before anything else reads the value
    norm     ``variance`` (layer norm), ``power`` (RMS norm) or "": how the norm that reads the target sees a row
    unit     which element of the cut axes each kept input column is. [k]
    read     the one position (of dimension 1) at which everything behind the target reads it, if there is one: that
             of a class token, at the last sum
    """

    node: str
    start: str
    reads: bool
    operand: str
    weight: str
    bias: str
    form: str
    path: tuple[str, ...]
    target: str
    norm: str
    eps: float
    unit: Tensor
    empty: bool = False
    read: int | None = None
    sign: int = 1


@dataclass(frozen=True)
class Sites:
    """What was found, in graph order, and why other layers were left out (node -> reason)."""

    sites: tuple[Site, ...]
    skipped: Mapping[str, str]


def find_sites(program: Program, keep: Keep, pruned: Graph, refit: bool, changed: Collection[str] = ()) -> Sites:
    """Every layer that reads a cut axis; with ``refit`` also those that read what changed before them.

    program   the dense program with its axes;  pruned: the graph of the sliced one (the same node names)
    changed   nodes whose values are others for another reason (merged tokens)
    """
    finder = _Finder(program, keep, {n.name: n for n in pruned.nodes})
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    behind: set[str] = set(changed)  # what some site reaches
    for node in program.graph.nodes:
        after = any(source.name in behind for source in node.all_input_nodes)
        found = finder.at(node, refit and after)
        if isinstance(found, Site):
            sites.append(found)
        elif found:
            skipped[node.name] = found
        if after or isinstance(found, Site):
            behind.add(node.name)
    return Sites(tuple(sites), skipped)


class _Finder:
    def __init__(self, program: Program, keep: Keep, pruned: Mapping[str, Node]) -> None:
        self.program, self.keep, self.pruned = program, keep, pruned
        self.graph = {n.name: n for n in program.graph.nodes}
        self.axes: Axes = program.need("axes")
        self.counts = {axis: len(index) for axis, index in keep.items()}
        self.bound, tensors = program.tensor_of_placeholder, program.tensors
        self.tied = collections.Counter(tensors[name].data_ptr() for name in self.bound.values() if name in tensors)
        self.tensors = tensors
        self.summed: dict[str, list[Dim]] = collections.defaultdict(list)
        for c in self.axes.contractions:
            self.summed[c.node].append(c.dim)

    def at(self, node: Node, refit: bool) -> Site | str | None:
        """The site at ``node``, the reason why it cannot be one, or None where recovery has no business."""
        layer = layer_at(node, self.bound)
        if refit and isinstance(layer, str) and is_depthwise(node):
            return self._depthwise(node)
        if not isinstance(layer, Layer):
            return layer if any(self._cut(dim) for dim in self.summed.get(node.name, ())) else None
        weight, bias = layer.weight, layer.bias
        dims: Dims = self.axes.dims[weight.name]
        into, out = layer.into, 1 - layer.into
        reads, makes = self._cut(dims[into]), self._cut(dims[out])
        if not reads and not refit:
            return None
        outputs = self.tensors[self.bound[weight.name]].shape[out]
        if not reads and not makes and outputs > WIDEST:
            return f"it has {outputs} outputs, more than {WIDEST}"
        if node.name not in self.pruned and not any(u.name in self.pruned for u in node.users):
            return None  # the whole branch is gone
        why = self._refusal(weight, dims)
        if why:
            return why
        path, target, norm, eps = goes_to(node, self.bound) if reads or not makes else ((), node.name, "", 0.0)
        if not reads and not path:  # its own dense output is what it should give
            target, norm, eps = node.name, "", 0.0
        start = node.name if node.name in self.pruned else self._find_replacement(node)
        if not start:
            return "nothing stands for it in the pruned graph"
        movable, sign = self._movable(node, bias)
        return Site(
            node.name,
            start,
            reads or bool(path),
            layer.operand,
            weight.name,
            movable,
            layer.form,
            path,
            target,
            norm,
            eps,
            self._units(dims[into]),
            empty=kept_total(dims[into], self.counts) == 0,
            read=position_read(self.graph[target]) if reads or path else None,
            sign=sign,
        )

    def _depthwise(self, node: Node) -> Site | str | None:
        """A depthwise convolution behind what changed: its own dense output is what it should give."""
        args = bind(node)
        weight, bias = args["weight"], args.get("bias")
        if weight.name not in self.bound:
            return "its weight is not multiplied as it is stored"
        dims: Dims = self.axes.dims[weight.name]
        if node.name not in self.pruned or kept_total(dims[0], self.counts) == 0:
            return None  # the whole branch is gone
        why = self._refusal(weight, dims)
        if why:
            return why
        movable, sign = self._movable(node, bias if isinstance(bias, Node) else None)
        unit = torch.zeros(0, dtype=torch.long)
        return Site(
            node.name,
            node.name,
            False,
            "input",
            weight.name,
            movable,
            "depthwise",
            (),
            node.name,
            "",
            0.0,
            unit,
            sign=sign,
        )

    def _movable(self, node: Node, bias: Node | None) -> tuple[str, int]:
        """(placeholder that moves the layer's output, whether more of it is more of that or less)."""
        if bias is not None:
            return (bias.name if bias.name in self.bound and not self._is_shared(bias) else ""), 1
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or family(reader) is not Family.BATCH_NORM:
            return "", 1
        args = bind(reader)
        mean = args.get("running_mean")
        if args.get("input") is not node or args.get("training") or not isinstance(mean, Node):
            return "", 1
        return (mean.name, -1) if mean.name in self.bound and not self._is_shared(mean) else ("", 1)

    def _cut(self, dim: Dim) -> bool:
        return kept_total(dim, self.counts) != total(dim)

    def _is_shared(self, placeholder: Node) -> bool:
        return len(placeholder.users) > 1 or self.tied[self.tensors[self.bound[placeholder.name]].data_ptr()] > 1

    def _refusal(self, weight: Node, dims: Dims) -> str:
        if self._is_shared(weight):
            return "its weight is shared with another layer"
        if not self.tensors[self.bound[weight.name]].is_floating_point():
            return "its weight is not of a floating type"
        sizes = self.axes.sizes
        if any(real_size(a.size, sizes) != a.size for d in dims for a in leaves(d)):
            return "a cut axis is folded with an open size"
        return ""

    def _find_replacement(self, node: Node) -> str:
        """The node that took the place of an emptied layer: what its first reader reads now."""
        for user in node.users:
            other = self.pruned.get(user.name)
            if other is not None and node in user.all_input_nodes:
                at = [n for n in other.all_input_nodes if n.name not in {m.name for m in user.all_input_nodes}]
                if len(at) == 1:
                    return at[0].name
        return ""

    def _units(self, dim: Dim) -> Tensor:
        """A number per kept position of ``dim``: equal where the same elements of all cut axes meet."""
        kept = kept_index(dim, self.keep)
        unit = torch.zeros(len(kept), dtype=torch.long)
        for axis in dict.fromkeys(leaves(dim)):
            if axis in self.keep:
                unit = unit * (axis.size + 1) + element_of(dim, axis)[kept] + 1
        return torch.unique(unit, return_inverse=True)[1] if len(kept) else unit


def position_read(node: Node) -> int | None:
    """The position of dimension 1 at which ``node`` is read, when all readers select that same one of [b, t, d]."""
    found: set[int | None] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        value = current.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 3:
            return None
        norms = [n for n in map(row_norm_at, current.users) if n is not None and n.source is current]
        inside = {part for norm in norms for part in norm.inside}
        pending += [norm.node for norm in norms if norm.inside]
        for user in current.users:
            name, args = op_name(user), bind(user)
            if user in inside or user in pending:
                continue
            if name == "select" and args.get("dim") in (1, -2):
                found.add(args["index"] if isinstance(args["index"], int) else None)
            elif name == "slice" and args.get("dim") in (1, -2) and _one_long(args):
                found.add(args["start"] or 0)
            elif family(user) in KEEPING or (name == "slice" and args.get("dim") == 0):
                pending.append(user)
            else:
                return None
    return found.pop() if len(found) == 1 else None


def _one_long(args: Mapping[str, Any]) -> bool:
    start, end = args.get("start") or 0, args.get("end")
    return isinstance(start, int) and isinstance(end, int) and end - start == 1


def align(value: Tensor, dims: Dims, keep: Keep) -> Tensor:
    """A dense tensor cut to what stays of its dims."""
    counts: dict[Axis, int] = {axis: len(index) for axis, index in keep.items()}
    for position, dim in enumerate(dims):
        if kept_total(dim, counts) != total(dim):
            value = value.index_select(position, kept_index(dim, keep).to(value.device))
    return value
