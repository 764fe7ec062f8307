"""Block OBS: what a tile is worth when the others may make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....data.batch import Calibration
from ....errors import OptionError
from ....ir.program import Program
from ....ir.sparsity import TWO_OF_FOUR, grid
from .layer_inputs import LayerInputs, layer_inputs
from .tiles import TileCriterion, tiles


@dataclass(frozen=True)
class Obert(TileCriterion):
    """``I[b] = 1/2 sum over p of s_p w_pJ (Hi[J, J])^-1 w_pJ^T``, then ``w_p <- w_p - w_pJ (Hi[J, J])^-1 Hi[J]``

    Tile b holds the outputs p and the inputs J.

    One tile after another, in every row of tiles: the cheapest goes, the tiles that stay are updated and so is the
    inverse. What is scored is the damage *after* the others made up for it, so that layers and order are right for a
    plan that is recovered (``RecoverBlocks`` solves for all kept tiles at once, which equals updating them in turn).

    H = mean x x^T + damp mean(diag) I of what the layer reads; s_p: the summed squared gradients of output p

    Shapes   [tiles]; with 2:4 the elements are weights, taken from left to right, two of each four (SparseGPT's way)
    Unit     nats per sample; comparable across layers
    Source   Kurtic et al. 2022 (oBERT), arXiv:2203.07259, eq. 4 to 6. Its Fisher is exact within runs of consecutive
             weights; a tile is wide, so ours is a product of one factor for the inputs and one number per output, and
             covers a whole row of tiles. Its code adds the updates of tiles that go together; here they go in turn
    Law      two inputs that say the same: one of them costs nothing; the curve never falls

    damp     share of H's mean diagonal on the diagonal
    probes   random directions per unlabelled sample; each costs one backward run
    """

    damp: float = 0.01
    probes: int = 1

    name = "obert"
    unit = "nats"
    needs_data = True
    comparable = True

    def __post_init__(self) -> None:
        if not self.damp > 0 or self.probes < 1:
            raise OptionError(
                "obert needs a damping above zero and at least one probe",
                where=f"--importance obert{{damp={self.damp},probes={self.probes}}}",
            )

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {name: found["values"] for name, found in self.assess(program, data, seed).items()}

    def assess(self, program: Program, data: Calibration | None, seed: int) -> dict[str, dict[str, Tensor]]:
        groups, result = tiles(program, self.name), {}
        inputs = layer_inputs(program, groups, data, seed, products=True, probes=self.probes)
        for g in groups:
            weight = g.matrix.matrix(program.tensors[g.matrix.parameter].detach()).double()
            found = inputs[g.name]
            if g.pattern == TWO_OF_FOUR:
                result[g.name] = {"values": left_to_right(weight, self._hessian(found)).flatten()}
                continue
            assert found.pull is not None
            marginal = _marginals(weight, self._hessian(found), found.pull, g.tile).flatten()
            removal = marginal.argsort(stable=True)
            delta = torch.cat([marginal.new_zeros(1), marginal[removal].cumsum(0)])
            result[g.name] = {"values": marginal, "order": removal.flip(0), "curve": delta[-1] - delta.flip(0)}
        return result

    def _hessian(self, found: LayerInputs) -> Tensor:
        assert found.product is not None
        level = float(found.square.mean())
        return found.product + (self.damp * level if level > 0 else 1.0) * torch.eye(
            len(found.square), dtype=torch.float64, device=found.square.device
        )


def _marginals(weight: Tensor, hessian: Tensor, pull: Tensor, tile: tuple[int, int]) -> Tensor:
    """What each tile costs when it goes, in its row's cheapest-first order, never less than what went before."""
    (bn, bk), (rows, columns) = tile, grid((weight.shape[0], weight.shape[1]), tile)
    extra = columns * bk - weight.shape[1]
    wide = functional.pad(weight, (0, extra, 0, rows * bn - weight.shape[0])).view(rows, bn, -1)
    pull = functional.pad(pull, (0, rows * bn - len(pull))).view(rows, bn)
    whole = torch.block_diag(hessian, torch.eye(extra, dtype=torch.float64, device=hessian.device))
    inverse = torch.linalg.inv(whole)
    return torch.stack([_one_row(w.clone(), inverse.clone(), s, bk) for w, s in zip(wide, pull, strict=True)])


def _one_row(weight: Tensor, inverse: Tensor, pull: Tensor, bk: int) -> Tensor:
    """Cheapest first: weight [BN, in], inverse [in, in], pull [BN] -> cost of each of the in / bk tiles as it goes."""
    count = weight.shape[1] // bk
    cost, gone, last = weight.new_zeros(count), weight.new_zeros(count, dtype=torch.bool), 0.0
    for _ in range(count):
        parts = weight.view(-1, count, bk).transpose(0, 1)  # [tiles, BN, bk]
        blocks = inverse.view(count, bk, count, bk).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        solved = torch.linalg.solve(blocks, parts.transpose(1, 2))  # [tiles, bk, BN]
        saliency = 0.5 * ((parts.transpose(1, 2) * solved).sum(1) * pull).sum(1)
        saliency[gone] = torch.inf
        best = int(saliency.argmin())
        last = max(last, float(saliency[best]))
        cost[best], gone[best] = last, True
        here = slice(best * bk, (best + 1) * bk)
        across = inverse[here].clone()  # [bk, in]
        weight -= solved[best].T @ across
        inverse -= across.T @ torch.linalg.solve(across[:, here], across)
        weight[:, here] = 0
        inverse[here], inverse[:, here] = 0, 0
        inverse[here, here] = torch.eye(
            bk, dtype=torch.float64, device=weight.device
        )  # so that later solves stay defined; its weight is zero
    return cost


def left_to_right(weight: Tensor, hessian: Tensor) -> Tensor:
    """Values whose two largest of every four are what OBS keeps. [out, in]

    Columns go from left to right; of each four the two with the smallest ``w^2 / Hi_jj`` go, and what they gave is
    moved to the columns behind them, by the Cholesky factor of the inverse (which holds the downdated inverses).
    Source   Frantar and Alistarh 2023 (SparseGPT), arXiv:2301.00774
    """
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight, values = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], 4):
        here = slice(start, min(start + 4, weight.shape[1]))
        values[:, here] = (weight[:, here] / factor.diagonal()[here]).square()
        gone = values[:, here].argsort(dim=1, stable=True).argsort(dim=1) < here.stop - start - 2
        for j in range(start, here.stop):
            error = torch.where(gone[:, j - start], weight[:, j] / factor[j, j], 0.0)
            weight[:, j:] -= error[:, None] * factor[j, j:]
    return values
