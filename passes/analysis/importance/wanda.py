"""Activation-aware magnitude of tiles."""

from __future__ import annotations

from torch import Tensor

from ....data.batch import Calibration
from ....ir.program import Program
from ....ir.sparsity import tile_areas, tile_sums
from .layer_inputs import layer_inputs
from .tiles import TileCriterion, tiles


class Wanda(TileCriterion):
    """``I[b] = mean over tile b of |W_pq| * sqrt(mean x_q^2)``

    x is what the layer reads, over samples and positions without padding.

    Shapes   [tiles], row by row; a border tile's mean is over what it holds
    Unit     output of the layer; comparable only within it
    Source   Sun et al. 2023, arXiv:2306.11695, eq. 1, averaged over tiles (the paper's elements are single weights and
             it ranks within a row; with 2:4 that is what comes out)
    Law      zero for a tile that no activation drives; batching does not matter
    """

    name = "wanda"
    unit = "mean output"
    needs_data = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        groups, found = tiles(program, self.name), {}
        inputs = layer_inputs(program, groups, data, seed, products=False, probes=0)
        for g in groups:
            weight = g.matrix.matrix(program.tensors[g.matrix.parameter].detach()).double().abs()
            driven = weight * inputs[g.name].square.sqrt()
            found[g.name] = (tile_sums(driven, g.tile).cpu() / tile_areas(g.matrix.shape, g.tile)).flatten()
        return found
