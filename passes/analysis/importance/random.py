"""Random scores: the floor that every other criterion must beat."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ....data.batch import Calibration
from ....ir.program import Program
from .criterion import Criterion, prunable


class Random(Criterion):
    """``I[i] ~ U(0, 1)``, seeded by the seed and the group's name, so that other groups do not matter.

    Unit     none; comparable only within a group
    Law      the same seed gives the same scores
    """

    name = "random"
    unit = "none"
    sees_experts = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        def draw(name: str, size: int) -> Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            return torch.rand(size, generator=generator, dtype=torch.float64)

        return {g.name: draw(g.name, g.size) for g in prunable(program)}
