"""Which values of a graph are the features of its layers, which of them an element is judged by, and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ....ir.dataflow import MOVES, ROW_NORMS, Family, bind, family_of, op_name, product
from ....ir.group import Kind
from ....ir.norms import row_norm_at
from ....ir.program import Program
from .consumers import Consumer, consumers

STRAIGHT = MOVES | {Family.ADD, Family.MULTIPLY, Family.JOIN}
"""What may stand between a feed-forward layer's output and the norm that reads it."""


@dataclass(frozen=True)
class Tap:
    """One value to look at.

    at        the node that ends its layer: what is summed over here or before belongs to that layer
    value     the node whose value is looked at
    masked    True where ``value`` is what ``at`` reads: a removal at ``at`` shows only in the masked operand
    rows      rows of [.., width], related to each other by ``M(F) = F F^T``; else whole maps, averaged over samples
    channel   the dimension of ``value`` that holds the features
    """

    at: str
    value: str
    masked: bool
    rows: bool
    channel: int


def find_taps(program: Program, location: str = "ffn") -> list[Tap]:
    """The features of every layer, in graph order.

    Transformers: layers that sum over a group of kind ``ffn`` or ``channel`` by a linear layer, or over an ``ffn`` one
    by a 1x1 convolution. ``location``: ``ffn`` their output, before the residual sum; ``norm`` the output of the first
    norm that reads it (the layer's output where none does); ``inner`` what they read. Layers whose output is the
    model's (a classifier) are none: their change is the output's.

    Without any that keeps positions, convolutional networks: what each convolution reads, that is after norm and
    activation; and last, layers whose rows are samples.
    """
    nodes = {n.name: n for n in program.graph.nodes}
    linear = {m.node for m in program.need("axes").matmuls if m.form == "linear"}
    found: dict[str, Tap] = {}
    for side in consumers(program):
        node, kinds = side.operand.node, {g.kind for g in side.groups}
        if side.operand.sampled is None:
            continue  # a table that is the same for all samples
        if node.name in linear and kinds & {Kind.FFN, Kind.CHANNEL}:
            channel = -1
        elif Kind.FFN in kinds and _pointwise(node):
            channel = 1
        else:
            continue
        if _leaves(node) and location != "inner":
            continue
        if location == "inner":
            found[node.name] = Tap(node.name, operand_source(side).name, True, True, side.operand.position)
        else:
            norm = _norm_after(node) if location == "norm" else None
            read = norm or node
            found[node.name] = Tap(node.name, read.name, False, True, -1 if norm is not None else channel)
    deep = {name for name in found if nodes[name].meta["val"].dim() > 2}
    if deep:
        return [found[name] for name in nodes if name in deep]
    maps: dict[str, Tap] = {}
    for side in consumers(program):
        if _convolves(side.operand.node) and side.operand.path == "input":
            source = operand_source(side).name
            maps.setdefault(source, Tap(side.operand.node.name, source, True, False, 1))
    return list(maps.values()) or [found[name] for name in nodes if name in found]


def _pointwise(node: Node) -> bool:
    """A 1x1 convolution over positions, which is a linear layer; over a pooled map it is a gate."""
    weight = bind(node).get("weight") if _convolves(node) else None
    return (
        isinstance(weight, Node)
        and all(s == 1 for s in weight.meta["val"].shape[2:])
        and any(s != 1 for s in node.meta["val"].shape[2:])
    )


def _convolves(node: Node) -> bool:
    one = product(node)
    return one is not None and one.form == "conv"


def _does(node: Node) -> Family | None:
    """What the op does, whether it writes in place or not."""
    return family_of(op_name(node).removesuffix("_"))


def operand_source(side: Consumer) -> Node:
    """The node whose value the consumer sums over."""
    name, _, index = side.operand.path.partition(".")
    value = bind(side.operand.node)[name]
    source: Node = value[int(index)] if index else value
    return source


def _leaves(node: Node) -> bool:
    """Whether nothing but the model's output reads ``node``."""
    return all(
        u.op == "output" or (_does(u) in STRAIGHT and len(u.all_input_nodes) == 1 and _leaves(u)) for u in node.users
    )


def _norm_after(node: Node) -> Node | None:
    """The first layer or RMS norm that reads ``node`` through sums and re-arrangements, in graph order."""
    seen, at = {node}, node
    while at.op != "output":
        at = at.next
        if not seen & set(at.all_input_nodes):
            continue
        if _does(at) in ROW_NORMS or row_norm_at(at) is not None:
            return at
        if _does(at) in STRAIGHT:
            seen.add(at)
    return None


# ---------------------------------------------------------------- who is judged by what


def reach(nodes: Iterable[Node], but: Iterable[Node] = ()) -> set[str]:
    """Names of ``nodes`` and of everything computed from them, other than through ``but``."""
    found: set[str] = set()
    pending, stop = list(nodes), {n.name for n in but}
    while pending:
        node = pending.pop()
        if node.name not in found and node.name not in stop:
            found.add(node.name)
            pending += node.users
    return found


@dataclass(frozen=True)
class View:
    """The taps that judge one group's elements.

    own       the tap of its own layer: the first one that it reaches
    wanted    taps that count, by number; empty for a group that reaches none
    reached   all that a removal moves
    masked    True where a removal shows at its own tap only in what the consumer reads, not in the value itself
    """

    own: int
    wanted: tuple[int, ...]
    reached: tuple[int, ...]
    masked: bool = False


def views(sides: Sequence[Consumer], taps: Sequence[Tap], which: str) -> dict[str, View]:
    """Group -> its view. ``which``: ``later`` than its own layer (the last one its own), ``from`` its own on, the
    ``next`` one (the last one its own), its ``own``, ``none``.

    A layer of another branch that is not computed from the group is not later, whatever the order of the graph.
    """
    by_group: dict[str, list[Consumer]] = {}
    for side in sides:
        for group in side.groups:
            by_group.setdefault(group.name, []).append(side)
    found = {}
    for name, mine in by_group.items():
        at = {side.operand.node.name for side in mine}
        after = reach(side.operand.node for side in mine)
        # a value that its last consumer reads is moved only where the mask is seen
        reached = tuple(z for z, tap in enumerate(taps) if tap.value in after or (tap.masked and tap.at in at))
        found[name] = view_of(reached, which, bool(reached) and taps[reached[0]].value not in after)
    return found


def view_of(reached: tuple[int, ...], which: str, masked: bool = False) -> View:
    """What judges something that reaches these taps, the first of which is its own layer's."""
    if not reached:
        return View(-1, (), ())
    own, later = reached[0], reached[1:]
    wanted = {"later": later or (own,), "from": reached, "next": later[:1] or (own,), "own": (own,), "none": ()}
    return View(own, wanted[which], reached, masked)


# ---------------------------------------------------------------- rows


def wide(x: Tensor) -> Tensor:
    """``x`` in at least fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def feature_rows(value: Tensor, tap: Tap, mask: Tensor | None, normalised: bool, most: int = 0) -> Tensor:
    """[rows, width] of the real positions, in at least fp32; ``mask`` [samples, positions] leaves padding out.

    ``normalised`` rows have length one (a row of zeros stays one of zeros). ``most``: so many rows at most, the same
    ones for every value of so many rows; 0 for all.
    """
    x = wide(value).movedim(tap.channel, -1)
    flat = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(flat):
        flat = flat[mask.reshape(-1).to(flat.device)]
    if 0 < most < len(flat):
        drawn = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:most].sort().values
        flat = flat[drawn.to(flat.device)]
    return functional.normalize(flat, dim=1) if normalised else flat
