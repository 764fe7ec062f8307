"""Masks that hide nothing go; all others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.intake.capture import capture
from fxprune.ir.dataflow import bind, op_name
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.transform.drop_masks import DropMasks
from fxprune.testing import run_flat


class Masked(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.bias = nn.Parameter(torch.zeros(6, 6))
        self.register_buffer("zeros", torch.zeros(6, 6))
        self.register_buffer("triangle", torch.ones(6, 6, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None]
        return F.scaled_dot_product_attention(y, y, y, self.mask(self, x))  # type: ignore[arg-type, call-arg]


def everything(_: nn.Module, x: Tensor) -> Tensor:
    return (torch.arange(6)[None, None, :, None] >= 0).expand(x.shape[0], 1, 6, 6)


CASES = {
    "all-true": (everything, True),
    "zeros": (lambda m, x: m.zeros, True),
    "triangle": (lambda m, x: m.triangle, False),
    "arange-triangle": (lambda m, x: torch.arange(6)[None] <= torch.arange(6)[:, None], False),
    "a trained bias, zero so far": (lambda m, x: m.bias, False),
    "from the input": (lambda m, x: (x[:, None, :, :1] > -100).expand(-1, -1, -1, 6), False),
}


@pytest.mark.parametrize("name", CASES)
def test_only_constant_masks_that_hide_nothing_go(name: str) -> None:
    mask, goes = CASES[name]
    x = torch.randn(2, 6, 4)
    before = capture(Masked(mask).eval(), (x,), {})  # type: ignore[arg-type]
    after: Program = Pipeline((DropMasks(),)).run(before)
    attention = next(n for n in after.graph.nodes if op_name(n) == "scaled_dot_product_attention")
    assert (bind(attention)["attn_mask"] is None) == goes
    assert (after is before) != goes
    other = torch.randn(5, 6, 4)
    torch.testing.assert_close(run_flat(after, [other])[0], run_flat(before, [other])[0])
