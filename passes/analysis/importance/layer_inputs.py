"""What linear layers read, and how strongly the loss hangs on what they give: second moments over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ....data.batch import Calibration
from ....errors import InternalError
from ....ir.linear_layers import BlockGroup
from ....ir.program import Program
from ....ir.signature import padding_mask
from ....process.ranks import add_up, mine
from .mask_gradients import first_samples
from .objective import objectives
from .tile_products import LayerRun


@dataclass(frozen=True)
class LayerInputs:
    """Of one layer, means over rows (tokens, without padding), fp64.

    square   of x_j^2, [in];  product: of x x^T, [in, in], or None
    pull     mean over samples of the sum over rows of e_p^2, e being the gradient of output p, [out], or None
    """

    square: Tensor
    product: Tensor | None
    pull: Tensor | None


def layer_inputs(
    program: Program, groups: Sequence[BlockGroup], data: Calibration | None, seed: int, products: bool, probes: int
) -> dict[str, LayerInputs]:
    """Group name -> the moments of its layer's inputs; ``probes`` backward runs per batch for ``pull``, or none.

    Memory   8 in^2 bytes per layer with ``products``
    """
    if data is None or not data.batches:
        raise InternalError("the inputs of layers need calibration data")
    firsts = first_samples(program, data)
    probes = min(probes, 1) if data.labelled else probes
    zeros, sums = partial(torch.zeros, dtype=torch.float64, device=program.device), dict[str, Tensor]()
    for g in groups:
        outputs, inputs = g.matrix.shape
        sums[f"{g.name}/rows"] = zeros(())
        sums[f"{g.name}/x"] = zeros(*((inputs, inputs) if products else (inputs,)))
        sums[f"{g.name}/e"] = zeros(outputs)
    for number in mine(len(data.batches)):
        batch = data.batches[number]
        run = LayerRun(program, groups, batch)
        outputs_now = run.forward()
        mask = padding_mask(program, run.flat)
        for g in groups:
            if g.name in run.inputs:
                x = _real(run.inputs[g.name], mask)
                sums[f"{g.name}/rows"] += len(x)
                sums[f"{g.name}/x"] += (x.T @ x).double() if products else x.double().square().sum(0)
        losses = objectives(program, outputs_now, batch, run.samples, seed, firsts[number], probes) if probes else []
        for probe, loss in enumerate(losses):
            run.found = {}
            if loss.requires_grad:
                loss.backward(retain_graph=probe < len(losses) - 1)
            for name, (_, e) in run.found.items():
                sums[f"{name}/e"] += e.double().square().sum((0, 1))
    added, found = add_up(sums), {}
    for g in groups:
        rows, x = float(added[f"{g.name}/rows"]), added[f"{g.name}/x"] / max(1.0, float(added[f"{g.name}/rows"]))
        if not torch.isfinite(x).all() or not rows:
            raise InternalError(f"the inputs of {g.matrix.node} are not finite, or there are none")
        pull = added[f"{g.name}/e"] / max(1, data.samples * probes) if probes else None
        found[g.name] = LayerInputs(x.diagonal().clone() if products else x, x if products else None, pull)
    return found


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that are no padding. [samples, positions, in] -> [rows, in]"""
    if mask is None or mask.shape != x.shape[:2]:
        return x.flatten(0, 1)
    return x[mask.to(x.device)]
