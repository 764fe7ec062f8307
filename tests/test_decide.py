"""Rounds of score, cut and score again: one plan of the dense model comes out, within the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from fxprune.cost import CostModel
from fxprune.decide import compose
from fxprune.errors import OptionError
from fxprune.plan import Choice, CompressionPlan


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 40), nn.Linear(40, 40), nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


@pytest.fixture(scope="module")
def chain() -> Chain:
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.randoms(use_true_random=False))
def test_two_cuts_in_a_row_are_one(size: int, random: object) -> None:
    generator = torch.Generator().manual_seed(size)
    first = torch.randperm(size, generator=generator)[: size // 2 + 1].sort().values
    second = torch.randperm(len(first), generator=generator)[: len(first) // 2 + 1].sort().values
    one = CompressionPlan({"a": Choice("ffn", size, tuple(first.tolist()))})
    two = CompressionPlan({"a": Choice("ffn", len(first), tuple(second.tolist()))})
    values = torch.arange(size)
    assert compose(one, two).choices["a"] == Choice("ffn", size, tuple(values[first][second].tolist()))


def test_a_group_that_only_one_cut_names_is_kept() -> None:
    a, b = Choice("ffn", 4, (1, 2)), Choice("ffn", 3, (0,))
    assert compose(CompressionPlan({"a": a}), CompressionPlan({"b": b})).choices == {"a": a, "b": b}


@pytest.mark.parametrize("recover", ["none", "ridge"])
def test_rounds_meet_the_budget_and_apply(chain: Chain, batches: list[torch.Tensor], recover: str) -> None:
    artifact = fxprune.compile(chain, "2x6", flops=0.4, data=batches, rounds=3, recover=recover, align=1)
    cost = artifact.report["cost"]
    dense, small = cost["dense"]["flops"], cost["compressed"]["flops"]
    assert 0.3 * dense < small <= 0.4 * dense
    assert artifact.plan.about["rounds"] == 3
    assert artifact.plan.about["predicted"]["flops"] == small
    again = fxprune.apply(chain, artifact.plan, "2x6")
    assert again.report["cost"]["compressed"]["flops"] == small


def test_rounds_score_the_model_as_it_then_is(chain: Chain, batches: list[torch.Tensor]) -> None:
    """An element whose only partner went is worthless in the next round, which one round cannot see."""
    once, thrice = (fxprune.plan(chain, "2x6", flops=0.4, data=batches, importance="fisher", rounds=n, align=1)
                    for n in (1, 3))
    assert once.need("plan").choices != thrice.need("plan").choices
    assert CostModel(thrice)() == CostModel(once)(), "the program that comes back is the dense one"


@pytest.mark.parametrize("rounds", [0, 21])
def test_rounds_out_of_range_are_refused(chain: Chain, rounds: int) -> None:
    with pytest.raises(OptionError, match="rounds"):
        fxprune.plan(chain, "2x6", flops=0.5, rounds=rounds)
