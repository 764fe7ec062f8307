"""Norms of rows, in one op or written out: what is normalised, how, and by which width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .dataflow import ROW_NORMS, Family, bind, family, op_name


@dataclass(frozen=True)
class RowNorm:
    """n(x) over the last dim: (x - mean x) / sqrt(var x + eps), or x / sqrt(|x|^2 / width + eps).

    node     what gives n(x), and with it ``weight`` and ``bias`` where one op does all;  source: x
    centred  the first of the two;  weight, bias: arguments of that op, or None
    width    a constant that the sum of squares is divided by, whatever the size of x; None where it is that size
    inside   nodes between ``source`` and ``node``, which nothing else reads
    """

    node: Node
    source: Node
    centred: bool
    eps: float
    weight: Node | None = None
    bias: Node | None = None
    width: float | None = None
    inside: tuple[Node, ...] = ()


def row_norm_at(node: Node) -> RowNorm | None:
    """The norm over one dim, the last, that ``node`` gives, if it gives one.

    ``layer_norm``, ``rms_norm``, and x * rsqrt(mean(x^2) + eps) or x / sqrt(..) written out, or with sum(x^2) / width
    in place of the mean.
    """
    if node.op != "call_function":
        return None
    if family(node) in ROW_NORMS and op_name(node) in ("layer_norm", "rms_norm"):
        return _match_fused(node)
    if op_name(node) in ("mul", "multiply", "div", "divide") and len(node.args) == 2:
        one, two = node.args
        pairs = [(one, two), (two, one)] if op_name(node).startswith("mul") else [(one, two)]
        for source, factor in pairs:
            if isinstance(source, Node) and isinstance(factor, Node):
                found = _match_written_out(node, source, factor)
                if found is not None:
                    return found
    return None


def row_norms(graph: torch.fx.Graph) -> Iterator[RowNorm]:
    """Every norm of rows in the graph, in its order."""
    for node in graph.nodes:
        found = row_norm_at(node)
        if found is not None:
            yield found


def _match_fused(node: Node) -> RowNorm | None:
    args = bind(node)
    source, weight, bias = args["input"], args.get("weight"), args.get("bias")
    if len(args["normalized_shape"]) != 1 or not isinstance(source, Node):
        return None
    eps = args.get("eps")
    if eps is None:
        eps = torch.finfo(source.meta["val"].dtype).eps
    return RowNorm(
        node,
        source,
        family(node) is Family.LAYER_NORM,
        float(eps),
        weight if isinstance(weight, Node) else None,
        bias if isinstance(bias, Node) else None,
    )


def _match_written_out(node: Node, source: Node, factor: Node) -> RowNorm | None:
    """The norm, where ``factor`` is one over the root of the power of ``source``'s rows."""
    inside, eps = [factor], 0.0
    width: float | None = None
    if op_name(factor) != ("rsqrt" if op_name(node).startswith("mul") else "sqrt"):
        return None
    power: Any = factor.args[0]
    if isinstance(power, Node) and op_name(power) == "add":
        inside.append(power)
        numbers = [a for a in power.args if isinstance(a, int | float)]
        tensors = [a for a in power.args if isinstance(a, Node)]
        if len(numbers) != 1 or len(tensors) != 1 or power.kwargs:
            return None
        power, eps = tensors[0], float(numbers[0])
    if isinstance(power, Node) and op_name(power) == "div" and isinstance(power.args[1], int | float):
        inside.append(power)
        power, width = power.args[0], float(power.args[1])
    if not isinstance(power, Node) or op_name(power) != ("mean" if width is None else "sum"):
        return None
    args, square = bind(power), power.args[0]
    inside.append(power)
    value = source.meta.get("val")
    if not isinstance(square, Node) or not isinstance(value, Tensor) or not args.get("keepdim") or args.get("dtype"):
        return None
    if [d % value.dim() for d in args.get("dim") or ()] != [value.dim() - 1] or not _is_square(square, source):
        return None
    inside.append(square)
    alone = all(set(n.users) <= {node, *inside} for n in inside)
    return RowNorm(node, source, False, eps, width=width, inside=tuple(inside)) if alone else None


def _is_square(square: Node, source: Node) -> bool:
    if op_name(square) == "pow":
        return square.args[0] is source and bool(square.args[1] == 2)
    return op_name(square) == "mul" and tuple(square.args) == (source, source)
