"""Sums over the weights that belong to each element of a group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....errors import FxpruneError
from ....ir.axis import element_of
from ....ir.group import PruneGroup
from ....ir.program import Program


def sum_over_slots(program: Program, group: PruneGroup, of: Callable[[Tensor], Tensor]) -> Tensor:
    """``sum of of(w)`` over the parameters of each element. [size] float64

    Buffers (batch-norm statistics, index tables) are no weights and do not count; a tied weight counts once.
    A weight that two dimensions of one tensor share (a square residual map) counts for both of its elements.
    Raises FxpruneError naming the parameter when one is not finite.
    """
    tensors, parameters = program.tensors, set(program.exported.graph_signature.inputs_to_parameters.values())
    result = torch.zeros(group.size, dtype=torch.float64)
    seen = set()
    for slot in group.slots:
        weight = tensors[slot.parameter].detach()
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), slot.position)
        if slot.parameter not in parameters or key in seen:
            continue
        seen.add(key)
        rest = [d for d in range(weight.dim()) if d != slot.position]
        values = of(weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight)
        along = (values.sum(rest, dtype=torch.float64) if rest else values.double()).cpu()
        if not torch.isfinite(along).all():
            raise FxpruneError(
                "a weight is not a finite number",
                where=slot.parameter,
                why=f"{int((~torch.isfinite(weight)).sum())} of its values are NaN or infinite",
                cure="load a checkpoint that is not damaged",
            )
        label = element_of(slot.dim, group.axis)
        mine = label >= 0
        result.index_add_(0, label[mine], along[mine])
    return result
