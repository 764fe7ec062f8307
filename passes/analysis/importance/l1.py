"""L1 magnitude: the summed absolute value of all weights that go with an element."""

from __future__ import annotations

import torch
from torch import Tensor

from ....data.batch import Calibration
from ....ir.program import Program
from .criterion import Criterion, prunable
from .magnitude import sum_over_slots


class L1(Criterion):
    """``I[i] = sum over parameter slots, over weights w of element i, of |w|``

    Shapes   a slot is one dimension of one parameter; its tensor is summed over all other dimensions
    Unit     summed weight; comparable only within a group
    Source   Li et al. 2017, arXiv:1608.08710, section 3.1, extended to everything that is removed with the element
    Law      zero iff all its weights are zero; unchanged by relabelling elements
    """

    name = "l1"
    unit = "summed weight"
    sees_experts = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {g.name: sum_over_slots(program, g, torch.abs) for g in prunable(program)}
