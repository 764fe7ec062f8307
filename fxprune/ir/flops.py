"""Multiply-accumulates as torch counts them: what the costs of axes are held against, and all that is known of an op
that no rule reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from ..errors import InternalError
from .cost import expression
from .program import Program

if TYPE_CHECKING:
    from .sizes import StandIns


def count_by_torch(node: Node, sizes: StandIns) -> int:
    """Multiply-accumulates of one node at the sizes of the example, from shapes alone.

    0 where torch counts nothing: it has no formula for products with a vector, or for experts (``_grouped_mm``).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # heavy: it brings sympy

    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise in node.target.tags:
        return 0

    def real(value: Any) -> Any:
        if isinstance(value, Node):
            return tree_map(real, value.meta.get("val"))
        if isinstance(value, Tensor):
            return torch.empty([sizes.real(s) for s in value.shape], dtype=value.dtype, device="meta")
        return sizes.real(value) if isinstance(value, SymInt) else value

    args, kwargs = tree_map(real, (node.args, node.kwargs))
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            node.target(*args, **kwargs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):  # needs values, or strides
        return 0
    return int(counter.get_total_flops()) // 2


def count_macs(program: Program) -> float:
    """Multiply-accumulates of one sample by torch's count, at the sizes of the example. 0 for a program without one."""
    from .example_sizes import stand_ins
    from .signature import samples_in

    if program.exported.example_inputs is None:
        return 0.0
    sizes = stand_ins(program)
    counted = sum(count_by_torch(node, sizes) for node in program.graph.nodes)
    return counted / samples_in(program.flatten(*program.example_inputs))


def check_counts(program: Program, pipeline: str = "") -> None:
    """Hold the multiply-accumulates that the axes predict for each node at the example's sizes against torch's count.

    Raises InternalError where they differ: every budget of MACs would be met in name only.
    """
    axes = program.need("axes")
    predicted: dict[str, int] = {}
    for product in axes.matmuls:
        count = expression(product.factors, set(), axes.sizes).constant
        predicted[product.node] = predicted.get(product.node, 0) + count
    for node in program.graph.nodes:
        counted, ours = count_by_torch(node, axes.stand_ins), predicted.get(node.name, 0)
        if counted and counted != ours:
            said = f"{node.name} ({node.target}) takes {counted} multiply-accumulates by torch's count, {ours} by ours"
            raise InternalError(said, pipeline=pipeline)
