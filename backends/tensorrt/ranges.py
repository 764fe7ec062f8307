"""Does float16 hold what the model computes? Every value of the cast graph, on data, against where float16 ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ...errors import LoweringError
from ...ir.program import Program
from ...ir.provenance import maker_of, source_line

LIMIT = 65504.0
SAMPLES = 32
LISTED = 5
CURE = "use dtype=bf16, which reaches as far as float32, or dtype=tf32"


@dataclass
class Seen:
    """What one node gave over all inputs: whether all of it was finite, and the largest magnitude that was."""

    finite: bool = True
    largest: float = 0.0


@dataclass
class _Watch(Interpreter):
    """Runs a graph and keeps what every node's floats did."""

    program: Program
    seen: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.program.exported.graph_module)

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented for" not in str(error):
                raise
            value = self._widen(n)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
                finite = one.isfinite()
                mine = self.seen.setdefault(n.name, Seen())
                mine.finite &= bool(finite.all())
                mine.largest = max(mine.largest, float(torch.where(finite, one, 0).abs().max()))
        return value

    def _widen(self, n: Node) -> Any:
        """What this CPU has no half kernel for, computed in float32 and rounded."""
        args, kwargs = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.float() if t.dtype is torch.float16 else t, self.fetch_args_kwargs_from_env(n)
        )
        value = getattr(self, n.op)(n.target, args, kwargs)
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.half() if t.dtype is torch.float32 else t, value)


def check_ranges(program: Program, cast: Program, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Run both on ``batches`` (user inputs, flat) and return what the report says about float16.

    Raises LoweringError that names the first node whose values float16 cannot hold although float32 can, and weights
    that it cannot hold. Infinities that the model makes itself (masks) are no overflow.
    """
    _check_weights(program, cast)
    wide, narrow = _Watch(program), _Watch(cast)
    count = 0
    with torch.no_grad():
        for flat in batches:
            wide.run(*program.arguments(flat), enable_io_processing=False)
            narrow.run(*cast.arguments(flat), enable_io_processing=False)
            first = next((t for t in flat if isinstance(t, Tensor) and t.dim()), None)
            count += 0 if first is None else len(first)
    nodes = {n.name: n for n in cast.graph.nodes}
    for node in cast.graph.nodes:
        mine, before = narrow.seen.get(node.name), wide.seen.get(node.name)
        if mine is None or mine.finite or (before is not None and not before.finite):
            continue
        if any(not narrow.seen[i.name].finite for i in node.all_input_nodes if i.name in narrow.seen):
            continue
        source = node if before is not None else _find_captured(node, wide)
        reached = wide.seen.get(source.name, Seen()).largest
        raise LoweringError(
            "float16 overflows",
            where=describe(source),
            why=f"its values reach {reached:.3g} on {count} samples, float16 ends at {LIMIT:.0f}",
            cure=CURE,
        )
    half = {
        name: one.largest
        for name, one in narrow.seen.items()
        if name in nodes and _is_half(nodes[name]) and one.largest < 0.999 * LIMIT
    }
    top = sorted(half, key=lambda name: -half[name])[:LISTED]
    return {
        "limit": LIMIT,
        "samples": count,
        "headroom": LIMIT / half[top[0]] if top and half[top[0]] else None,
        "largest": [
            {"node": name, "value": half[name], "line": source_line(nodes[name].meta.get("stack_trace"))}
            for name in top
        ],
    }


def describe(node: Node) -> str:
    """``node linear_3 (aten.linear.default), from model.py:12 `...` ``, with the pass that made it."""
    made, line = maker_of(node), source_line(node.meta.get("stack_trace"))
    return f"node {node.name} ({node.target}){f', made by {made}' if made else ''}{f', from {line}' if line else ''}"


def _check_weights(program: Program, cast: Program) -> None:
    """Buffers may go below: those are masks, and stay finite."""
    parameters = set(program.exported.graph_signature.inputs_to_parameters.values())
    for name, tensor in cast.tensors.items():
        before = program.tensors.get(name)
        if tensor.dtype is torch.float16 and before is not None and before.dtype is torch.float32 and before.numel():
            finite = torch.where(before.isfinite(), before.detach(), 0)
            largest = float((finite.abs() if name in parameters else finite).max())
            if largest > LIMIT:
                raise LoweringError(
                    "float16 cannot hold a weight",
                    where=name,
                    why=f"it reaches {largest:.3g}, float16 ends at {LIMIT:.0f}",
                    cure=CURE,
                )


def _find_captured(node: Node, wide: _Watch) -> Node:
    """The node of the captured graph whose value ``node`` (a cast) narrows."""
    while node.name not in wide.seen and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float16
