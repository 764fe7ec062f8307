"""First-order Taylor: how fast the loss moves when an element's mask moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data.batch import Calibration
from ....ir.program import Program
from .criterion import Criterion, prunable
from .mask_gradients import add_over_passes, notes_on_samples


@dataclass(frozen=True)
class Taylor(Criterion):
    """``I[i] = mean over samples b of | dL_b / dm[i] |``  with  ``dL/dm[i] = sum over consumers of x[i] * dL/dx[i]``

    The activation form: ``x`` is what enters the consumers. It equals ``sum of w * dL/dw`` over their weights.
    The absolute value is taken per sample, since at a trained optimum (and without labels) the mean gradient is zero.
    ``L_b`` is the loss to the sample's label, or without labels the Fisher probe of the model's own output.

    Shapes   dL/dm is [batch, size]
    Unit     nats per sample; comparable across groups
    Source   Molchanov et al. 2017, arXiv:1611.06440, eq. 8, and 2019, arXiv:1906.10771, eq. 8
    Law      zero for an element whose consumers' weights are zero; unchanged by relabelling; batching does not matter

    probes   random directions per unlabelled sample; each costs one backward pass
    """

    probes: int = 2

    name = "taylor"
    unit = "nats"
    needs_data = True
    comparable = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        # a sum over n samples of random sign is sqrt(n) times smaller than the sum of absolute values
        total, seen = add_over_passes(
            self.name, program, data, seed, self.probes, lambda g, samples: g.abs().sum(0) * (samples / len(g)) ** 0.5
        )
        nothing = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in prunable(program)}
        return {name: value / max(seen, 1) for name, value in {**nothing, **total}.items()}

    def notes(self, program: Program) -> Sequence[str]:
        return notes_on_samples(program)
