"""Magnitude of tiles: no data, no model run."""

from __future__ import annotations

from torch import Tensor

from ....data.batch import Calibration
from ....ir.program import Program
from ....ir.sparsity import tile_areas, tile_sums
from .tiles import TileCriterion, tiles


class TileMagnitude(TileCriterion):
    """``I[b] = mean over tile b of |W|``

    Shapes   [tiles], row by row; a border tile's mean is over what it holds
    Unit     weight; comparable only within a layer
    Law      zero for a tile of zeros
    """

    name = "magnitude"
    unit = "mean weight"

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        found = {}
        for g in tiles(program, self.name):
            weight = g.matrix.matrix(program.tensors[g.matrix.parameter].detach()).double().abs()
            found[g.name] = (tile_sums(weight, g.tile).cpu() / tile_areas(g.matrix.shape, g.tile)).flatten()
        return found
