"""L2 magnitude: the Euclidean norm of all weights that go with an element."""

from __future__ import annotations

import torch
from torch import Tensor

from ....data.batch import Calibration
from ....ir.program import Program
from .criterion import Criterion, prunable
from .magnitude import sum_over_slots


class L2(Criterion):
    """``I[i] = sqrt( sum over parameter slots, over weights w of element i, of w^2 )``

    Shapes   a slot is one dimension of one parameter; its tensor is summed over all other dimensions
    Unit     weight norm; comparable only within a group
    Source   Li et al. 2017, arXiv:1608.08710, section 3.1, extended to everything that is removed with the element
    Law      zero iff all its weights are zero; unchanged by relabelling elements
    """

    name = "l2"
    unit = "weight norm"
    sees_experts = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {g.name: sum_over_slots(program, g, torch.square).sqrt() for g in prunable(program)}
