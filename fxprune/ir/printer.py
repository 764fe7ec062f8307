"""A program as text: one line per node, dims spelled as products of named axes, and what a plan keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from .axis import Axis, leaves, show
from .program import Program

MAX_LISTED = 12  # kept indices are quoted up to this many


def to_text(program: Program, inputs: bool = False) -> str:
    """The graph of ``program``; with axes known, every tensor's dims; with a plan, what it changes on the line.

    ``inputs=True`` lists parameters and buffers as well.

    ``%linear = linear(%x, fc1.weight, fc1.bias)   [batch, ffn]   fc1:ffn 64 -> 32 {keep 0 2 5 ...}``
    """
    names, bound = _axis_names(program), program.tensor_of_placeholder
    lines = []
    for node in program.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], bound)}")
            continue
        if node.op == "placeholder" and node.name in bound and not inputs:
            continue
        left = f"{bound[node.name]}" if node.name in bound else f"%{node.name} = {_call(node, bound)}"
        lines.append("   ".join([left, *filter(None, [_dims(program, node, names), _changes(program, node)])]))
    return "\n".join(lines) + "\n"


def _call(node: Node, bound: dict[str, str]) -> str:
    if node.op == "placeholder":
        return "input"
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    arguments = [_argument(a, bound) for a in node.args]
    arguments += [f"{k}={_argument(v, bound)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _argument(value: Any, bound: dict[str, str]) -> str:
    if isinstance(value, Node):
        return bound.get(value.name, f"%{value.name}")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_argument(v, bound) for v in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dims(program: Program, node: Node, names: dict[Axis, str]) -> str:
    dims = program.axes.dims.get(node.name) if program.axes is not None else None
    if isinstance(dims, list) and all(isinstance(d, tuple) for d in dims):
        return "[" + ", ".join(show(d, names) for d in dims) + "]"
    value = node.meta.get("val")
    return "[" + ", ".join(map(str, value.shape)) + "]" if isinstance(value, torch.Tensor) and dims is None else ""


def _changes(program: Program, node: Node) -> str:
    """What the plan does to the axes that this node produces."""
    if program.plan is None or program.axes is None or node.op != "call_function":
        return ""
    produced = (dim for dim, name in program.axes.tags.get("produce", ()) if name == node.name)
    made = dict.fromkeys(axis for dim in produced for axis in leaves(dim))
    return "  ".join(filter(None, (_show_kept(program, axis) for axis in made)))


def _show_kept(program: Program, axis: Axis) -> str:
    group = program.group_of(axis)
    choice = program.plan.elements.get(group.name) if group is not None and program.plan is not None else None
    if choice is None or len(choice.keep) == choice.size:
        return ""
    listed = " ".join(map(str, choice.keep[:MAX_LISTED])) + (" ..." if len(choice.keep) > MAX_LISTED else "")
    return f"{choice.kind}: {choice.size} -> {len(choice.keep)} {{keep {listed}}}"


def _axis_names(program: Program) -> dict[Axis, str]:
    """Kinds name the axes of groups; symbols keep their own name."""
    names = {g.axis: str(g.kind) for g in program.groups or () if g.kind != "other"}
    axes = program.axes
    for axis in _all_leaves(program):
        if axes is not None and axis.size in axes.symbols:
            names[axis] = axes.symbols[axis.size]
    return names


def _all_leaves(program: Program) -> Iterator[Axis]:
    def walk(dims: Any) -> Iterator[Axis]:
        if isinstance(dims, tuple):
            yield from leaves(dims)
        elif isinstance(dims, list):
            for d in dims:
                yield from walk(d)

    for dims in program.axes.dims.values() if program.axes is not None else ():
        yield from walk(dims)
