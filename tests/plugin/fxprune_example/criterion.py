"""A criterion: one non-negative number per element."""

import torch
from torch import Tensor

from fxprune.extend import Calibration, Criterion, Program, prunable


class First(Criterion):
    """Early elements matter more: ``I[i] = size - i``. Unit: places."""

    name = "first"
    unit = "places"

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {g.name: torch.arange(g.size, 0, -1, dtype=torch.float64) for g in prunable(program)}
