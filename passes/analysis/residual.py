"""Residual streams: axes along which ``x + f(x)`` adds what was computed from the very same elements."""

from __future__ import annotations

import collections

from torch.fx import Node

from ...ir.axes import Axes
from ...ir.axis import Axis, Dims, leaves, total
from ...ir.dataflow import MOVES, Family, family_of, op_name, ops_in
from ...ir.program import Program

THROUGH = MOVES | {Family.MULTIPLY}
ADDITIONS = ops_in(Family.ADD) | {"addcmul", "lerp"}


def residual_streams(program: Program) -> set[Axis]:
    """Leaf axes of the residual streams.

    In an addition one side holds the elements as they were, the other what a layer that summed over them has made. A
    bias that every layer adds to its scores (T5) looks alike, but what comes of it is a softmax.
    """
    axes: Axes = program.need("axes")
    before, number = _ancestors(program)
    readers: dict[Axis, list[Node]] = collections.defaultdict(list)
    nodes = {n.name: n for n in program.graph.nodes}
    averages = {literal.node for literal in axes.literals if literal.form in ("mean", "norm")}  # a gate, not a layer
    for contraction in (c for c in axes.contractions if c.node not in averages):
        for axis in leaves(contraction.dim):
            readers[axis].append(nodes[contraction.node])
    ends = {f.node for facts in (axes.contractions, axes.statistics) for f in facts}
    softmaxes = {node for _, node in axes.tags.get("softmax", ())} - ends
    found: set[Axis] = set()
    for node in program.graph.nodes:
        sides = [n for n in node.args[:2] if isinstance(n, Node)]
        if node.op != "call_function" or op_name(node) not in ADDITIONS or len(sides) < 2:
            continue
        shared = _find_shared(*(axes.dims.get(n.name) or [] for n in sides)) - found
        if not shared or _meets(node, softmaxes, ends):
            continue
        for axis in shared:
            if any(
                before[made] >> number[reader] & 1 and before[reader] >> number[kept] & 1
                for kept, made in (sides, sides[::-1])
                for reader in readers[axis]
            ):
                found.add(axis)
    return found


def branch_ends(program: Program) -> set[str]:
    """Names of the nodes whose value, moved or scaled at most, is all that one addition adds to what it was made of:
    the last products of residual branches."""
    before, number = _ancestors(program)
    found: set[str] = set()
    for node in program.graph.nodes:
        sides = [n for n in node.args[:2] if isinstance(n, Node)]
        if node.op != "call_function" or op_name(node) not in ADDITIONS or len(sides) < 2:
            continue
        for end, kept in (sides, sides[::-1]):
            made = [end] if before[end] >> number[kept] & 1 and end is not kept else []
            while made and len(made[-1].users) == 1:
                found.add(made[-1].name)
                through = family_of(op_name(made[-1])) in THROUGH
                made = [n for n in made[-1].all_input_nodes if before[n] >> number[kept] & 1] if through else []
                made = made if len(made) == 1 else []
    return found


def _ancestors(program: Program) -> tuple[dict[Node, int], dict[Node, int]]:
    """Node -> a bit for itself and for every node that it depends on; node -> the number of its bit."""
    before: dict[Node, int] = {}
    number: dict[Node, int] = {}
    for i, node in enumerate(program.graph.nodes):
        bits = 1 << i
        for source in node.all_input_nodes:
            bits |= before[source]
        before[node], number[node] = bits, i
    return before, number


def _find_shared(one: Dims, two: Dims) -> set[Axis]:
    """Leaves that meet in an element-wise op of two tensors."""
    pairs = zip(reversed(one), reversed(two), strict=False)
    return {a for p, q in pairs if total(p) > 1 and total(q) > 1 for a in {*leaves(p)} & {*leaves(q)}}


def _meets(node: Node, wanted: set[str], ends: set[str]) -> bool:
    """Whether one of ``wanted`` reads what comes of ``node``, before anything sums over it."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.name in wanted:
                return True
            if user not in seen and user.name not in ends:
                seen.add(user)
                pending.append(user)
    return False
