"""``FuseNorms``: norms that divide by a width of their own become one op again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...ir.dataflow import is_mutable
from ...ir.layer_editor import Replacing
from ...ir.norms import RowNorm, row_norms
from ...ir.pipeline import Transform
from ...ir.program import Program


@dataclass(frozen=True)
class FuseNorms(Transform):
    """x / sqrt(|x|^2 / D + eps) over k elements becomes ``rms_norm`` with weight sqrt(D / k) and eps D / k.

    The same number: |x|^2 / D + eps = (k / D) (|x|^2 / k + eps D / k). For after slicing; before it, the width D must
    stay a constant in the graph. The weights are buffers: nothing trains them.
    """

    @staticmethod
    def applies(program: Program) -> bool:
        """Whether the program has such norms."""
        return any(norm.width is not None for norm in row_norms(program.graph))

    def run(self, program: Program) -> Program:
        found = [norm for norm in row_norms(program.graph) if norm.width is not None]
        if not found:
            return program
        edit, weights = Replacing(program, self.slug()), dict[tuple[int, float, torch.dtype], Node]()
        for norm in found:
            _fuse(edit, norm, weights)
        edit.graph.eliminate_dead_code(is_impure_node=_stays)
        return program.without_facts(exported=edit.finish())


def _fuse(edit: Replacing, norm: RowNorm, weights: dict[tuple[int, float, torch.dtype], Node]) -> None:
    old, x = edit.nodes[norm.node.name], edit.nodes[norm.source.name]
    value: Any = x.meta["val"]
    assert norm.width is not None
    count = int(value.shape[-1])
    key = (count, norm.width, value.dtype)
    if key not in weights:
        weight = torch.full((count,), math.sqrt(norm.width / count), dtype=value.dtype, device=value.device)
        weights[key] = edit.buffer(f"fxprune_norm_{len(weights)}", weight)
    with edit.graph.inserting_before(old):
        new = edit.call(old, torch.ops.aten.rms_norm.default, x, [count], weights[key], norm.eps * norm.width / count)
    edit.instead(old, new)


def _stays(node: Node) -> bool:
    return node.op in ("placeholder", "output") or is_mutable(node)
