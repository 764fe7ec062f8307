"""``SearchBlocks``: which tiles stay, so that what is multiplied costs at most the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import BudgetInfeasible, NothingToPrune, OptionError, nearest
from ...ir.choice import AnyChoice
from ...ir.cost import COUNTED, Budget, CostModel
from ...ir.importance import ImportanceScores
from ...ir.linear_layers import BlockGroup
from ...ir.pipeline import Search
from ...ir.plan import CompressionPlan
from ...ir.program import Program
from ...ir.sparsity import TWO_OF_FOUR, Sparsity, tile_areas
from .tile_allocation import Counts, LayerCurve, kkt, lsp, uniform

ALLOCATIONS = ("auto", "kkt", "lsp", "uniform")


@dataclass(frozen=True)
class SearchBlocks(Search):
    """Choose tiles in the order of their scores, as many per layer as the allocation says. With 2:4 there is nothing to
    allocate: the two best of every four stay.

    budget      flops only: tiles are zeroed, not removed, so parameters and bytes stay. None with 2:4
    allocation  ``kkt``: least total distortion; ``lsp``: the paper's rule (see ``tile_allocation``); ``uniform``: the
                same share of every layer. ``auto``: kkt, or uniform where scores cannot be compared across layers
    power       of ``lsp``: with the power term
    smooth      of ``lsp``: weight of the moving average
    dense       multiply-accumulates that a share is of: those of the model before slicing; by default the program's own

    Law      the effective MACs are at most the budget, and within one tile of the largest layer of it
    Errors   OptionError, NothingToPrune, BudgetInfeasible with the range that is reachable
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "dense")
    needs: ClassVar[tuple[str, ...]] = ("axes", "groups", "scores")
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    budget: Budget | None = None
    allocation: str = "auto"
    power: bool = True
    smooth: float = 0.6
    dense: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise OptionError(
                f"unknown allocation '{self.allocation}'", where="--blocks", cure=nearest(self.allocation, ALLOCATIONS)
            )
        if self.budget is not None and self.budget.metric != "flops":
            raise OptionError(
                f"tiles cannot meet a budget of {self.budget.metric}",
                where=f"--{self.budget}",
                why="they are zeroed inside a weight that keeps its size",
                cure="give `--flops`",
            )
        if not 0 <= self.smooth < 1:
            raise OptionError("the moving average has a weight from 0 to below 1", where=f"smooth={self.smooth}")

    def run(self, program: Program) -> Program:
        groups = [g for g in program.need("groups") if g.prunable and isinstance(g, BlockGroup)]
        if not groups:
            why = "; ".join(sorted({g.frozen for g in program.need("groups") if g.frozen})) or "it has no linear layer"
            raise NothingToPrune(
                "no weight can be pruned in tiles",
                where=program.name,
                why=why,
                cure="`ends=true` takes patch embeddings and classifiers as well",
            )
        scores, dense = program.need("scores"), CostModel(program)().flops
        if groups[0].pattern == TWO_OF_FOUR:
            blocks = {name: tiles for g in groups for name, tiles in g.choose(g.floor, scores).items()}
            return program.but(plan=self._plan(groups, blocks, scores, dense, "two of every four"))
        if self.budget is None:
            raise OptionError("tiles need a budget", where="--blocks", cure="give `--flops 0.5`")
        layers = [_curve(g, scores[g.name], g.removal(scores[g.name])) for g in groups]
        limit = self.budget.amount * (self.dense or dense) if self.budget.relative else self.budget.amount
        target = max(0, -int(-(dense - limit) // 1))
        least = dense - sum(one.saved[one.most] for one in layers)
        if least > limit:
            raise self._infeasible(program, dense, least, limit)
        allocation = self.allocation
        if allocation == "auto":
            allocation = "kkt" if all(scores[g.name].comparable for g in groups) else "uniform"
        gone = self._allocate(layers, allocation, target)
        blocks = {
            name: tiles
            for g, count in zip(groups, gone, strict=True)
            for name, tiles in g.choose(g.size - count, scores).items()
        }
        return program.but(plan=self._plan(groups, blocks, scores, dense, allocation))

    def _allocate(self, layers: Sequence[LayerCurve], allocation: str, target: int) -> Counts:
        if allocation == "uniform":
            return uniform(layers, target)
        return kkt(layers, target) if allocation == "kkt" else lsp(layers, target, self.power, self.smooth)

    def _plan(
        self,
        groups: Sequence[BlockGroup],
        choices: dict[str, AnyChoice],
        scores: dict[str, ImportanceScores],
        dense: int,
        allocation: str,
    ) -> CompressionPlan:
        first = scores[groups[0].name]
        plan = CompressionPlan(choices)
        blocks, by_name = plan.blocks, {g.matrix.parameter: g for g in groups}
        effective = dense - sum(
            g.matrix.macs - round(g.matrix.macs * blocks[n].density) for n, g in by_name.items() if n in blocks
        )
        about = {
            "criterion": first.criterion,
            "unit": first.unit,
            "seed": first.seed,
            "budget": str(self.budget),
            "method": allocation,
            "counted": COUNTED,
            "pattern": groups[0].pattern,
            "dense": {"flops": dense},
            "predicted": {"flops": effective},
            "power": power_estimate(groups, blocks),
        }
        return replace(plan, about=about)

    def _infeasible(self, program: Program, dense: int, least: int, limit: float) -> BudgetInfeasible:
        frozen = sorted({g.frozen for g in program.need("groups") if g.frozen})
        why = (
            f"reachable {least / dense:.3f}..1.00 of the dense flops, asked {limit / dense:.3f}: attention "
            "products, convolutions and the layers that stay dense are not made of tiles"
        )
        return BudgetInfeasible(
            f"the budget {self.budget} is out of reach for tiles",
            where=program.name,
            why=why + (f"; dense: {'; '.join(frozen)}" if frozen else ""),
            cure=f"a budget of at least {least / dense + 0.005:.2f}, or slice as well",
        )


def power_estimate(groups: Sequence[BlockGroup], blocks: dict[str, Sparsity]) -> dict[str, Any]:
    """LSP's estimate of the power of the linear layers, as a share of the dense ones: an estimate, nothing is measured.

    ``P = p_m sum_l (M_l / BM) (1 - alpha_l) (N_l / BN) (K_l / BK)``: proportional to the tile products that run,
    whatever p_m and BM are.      Source: LSP, Eq. 7 and 8
    """
    whole = sum(g.matrix.rows * g.size for g in groups)
    left = sum(
        g.matrix.rows * (int(blocks[g.matrix.parameter].kept.sum()) if g.matrix.parameter in blocks else g.size)
        for g in groups
    )
    return {"share": left / whole if whole else 1.0, "measured": False}


def _curve(group: BlockGroup, scores: ImportanceScores, removal: Tensor) -> LayerCurve:
    """A layer's curve; where scores only rank within a layer, in shares of the layer's MACs."""
    start = torch.zeros(1, dtype=torch.float64)
    if scores.curve is not None:
        delta = scores.curve.double()[-1] - scores.curve.double().flip(0)
    else:
        delta = torch.cat([start, scores.values.double()[removal].cumsum(0)])
    if not scores.comparable and float(delta[-1]) > 0:
        delta = delta / delta[-1] * group.matrix.macs
    areas = tile_areas(group.matrix.shape, group.tile).flatten()[removal]
    saved = [0, *(group.matrix.rows * areas.cumsum(0)).tolist()]
    rows = group.matrix.rows * group.matrix.shape[0] * group.matrix.shape[1] / (group.tile[0] * group.tile[1])
    return LayerCurve(group.name, tuple(saved), tuple(delta.tolist()), group.size - group.floor, rows)
