"""What the tests of tiles share: an analysed model, a plan of tiles, and its zeroed program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.data.batch import Calibration
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget
from fxprune.ir.linear_layers import BlockGroup
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_blocks import FindBlocks
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_blocks import SearchBlocks
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.sparsify_blocks import SparsifyBlocks
from support import recovering

START = ("axes", "groups", "plan")


class Classifier(nn.Module):
    """Ragged on purpose: embedding, fused qkv, projection, feed-forward, norm, classifier. [b, t, 10] -> [b, 3]"""

    def __init__(self, width: int = 12, hidden: int = 22) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(10, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 3)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 3, c // 3).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def data(batches: int = 4, batch: int = 8) -> Calibration:
    return recovering.floats(batch, 5, 10, batches=batches)


def analysed(model: nn.Module, given: Calibration, pattern: str = "8x4", **options: Any) -> Program:
    first = given.batches[0]
    passes = (Clean(), Inline(), PropagateAxes(), FindBlocks(pattern, **options))
    return Pipeline(passes).run(capture(model.eval(), first.args, dict(first.kwargs)))


def planned(
    program: Program, given: Calibration | None, ratio: float = 0.5, criterion: str = "lsp", **options: Any
) -> Program:
    two = program.need("groups")[0].pattern == "2:4"
    search = SearchBlocks(None if two else Budget("flops", ratio), **options)
    return Pipeline((ScoreGroups(criterion, data=given), search), start=("axes", "groups")).run(program)


def zeroed(program: Program) -> Program:
    return Pipeline((SparsifyBlocks(),), start=START).run(program)


def live(program: Program) -> dict[str, BlockGroup]:
    return {g.matrix.parameter: g for g in program.need("groups") if g.prunable}


def weight(program: Program, name: str) -> Tensor:
    return program.tensors[name].detach()


def model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier()
