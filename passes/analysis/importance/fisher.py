"""Fisher information of a mask on each element: the second-order loss of removing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Calibration
from ....program import Program
from .criterion import Criterion, prunable
from .mask_gradients import add_over_passes, notes_on_samples


@dataclass(frozen=True)
class Fisher(Criterion):
    """``I[i] = 1/2 * mean over samples b of ( dL_b / dm[i] )^2``     m: 0/1 mask on the consumers, at m = 1

    One mask per element reaches all consumers of its group, so their gradients are summed *before* squaring, and
    gradients are per sample: squares of batch means are smaller and rank differently.
    ``L_b`` is the loss to the sample's label, or without labels the Fisher of the model's output (``objective.py``).

    Shapes   dL/dm is [batch, size]
    Unit     nats per sample (squared output deviations for outputs that are no logits); comparable across groups
    Source   Kwon et al. 2022, arXiv:2204.09656, eq. 6, with per-sample gradients and the factor 1/2 of the Taylor term
    Law      zero for an element that nothing depends on; unchanged by relabelling elements; batching does not matter

    probes   random directions per unlabelled sample; each costs one backward pass
    """

    probes: int = 2

    name = "fisher"
    unit = "nats"
    needs_data = True
    comparable = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        # without a batch axis g is the sum over samples: its square has the same expectation (independence)
        total, seen = add_over_passes(self.name, program, data, seed, self.probes, lambda g, _: g.square().sum(0))
        nothing = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in prunable(program)}
        return {name: 0.5 * value / max(seen, 1) for name, value in {**nothing, **total}.items()}

    def notes(self, program: Program) -> Sequence[str]:
        return notes_on_samples(program)
