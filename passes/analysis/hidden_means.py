"""Means and norms over hidden axes keep the divisor of the dense model, so that cutting equals masking."""

from __future__ import annotations

import collections
from dataclasses import replace

from ...ir.axes import Axes, Contraction, Literal
from ...ir.axis import Axis, leaves
from ...ir.dataflow import op_name
from ...ir.program import Program
from .residual import residual_streams

MEANS = {"mean": "self"}
NORMS = {"layer_norm": "input", "rms_norm": "input"}
"""Op -> the argument that it averages."""


def keep_divisors(program: Program) -> Axes:
    """The program's axes, where statistics over hidden axes are sums over what stays, by the dense count.

    Residual streams are left alone: a stream that is cut is a narrower model, whose norms average what there is, as the
    model's own code would. The same goes for the width of queries, keys and values.
    """
    axes: Axes = program.need("axes")
    ops = {n.name: op_name(n) for n in program.graph.nodes if n.op == "call_function"}
    several = collections.Counter(s.node for s in axes.statistics)
    one = [s for s in axes.statistics if ops[s.node] in MEANS or (ops[s.node] in NORMS and several[s.node] == 1)]
    hidden = _find_hidden(program) if one else set()
    kept = {s: {**MEANS, **NORMS}[ops[s.node]] for s in one if set(leaves(s.dim)) and set(leaves(s.dim)) <= hidden}
    if not kept:
        return axes
    normed = {s.node for s in kept if ops[s.node] in NORMS}
    dims = {s.node: tuple(t.dim for t in kept if t.node == s.node) for s in kept}
    return replace(
        axes,
        statistics=tuple(s for s in axes.statistics if s not in kept),
        contractions=(*axes.contractions, *(Contraction(s.node, s.dim, ((kept[s], s.position),)) for s in kept)),
        literals=(
            *(lit for lit in axes.literals if lit.node not in normed),
            *(Literal(node, "", "norm" if node in normed else "mean", found) for node, found in dims.items()),
        ),
    )


def _find_hidden(program: Program) -> set[Axis]:
    """Leaf axes that layers make, that no residual stream runs through, and along which no activations meet in a
    product."""
    axes: Axes = program.need("axes")
    made = {axis for dim, _ in axes.tags.get("produce", ()) for axis in leaves(dim)}
    frozen = {axis for f in axes.frozen for axis in leaves(f.dim)}
    met = {a for m in axes.matmuls if m.form == "matmul" for dim in (m.k, m.m, m.n) for a in leaves(dim)}
    return made - frozen - met - residual_streams(program)
