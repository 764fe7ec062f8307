"""Rounds of score, cut and score again: one plan of the dense model comes out, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from fxprune.errors import OptionError
from fxprune.ir.cost import CostModel
from fxprune.ir.plan import Choice, CompressionPlan, compose
from fxprune.passes.search.search_plan import HEAD_SCALES


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
    once, thrice = (
        fxprune.plan(chain, "2x6", flops=0.4, data=batches, importance="fisher", rounds=n, align=1) for n in (1, 3)
    )
    assert once.need("plan").choices != thrice.need("plan").choices
    assert CostModel(thrice)() == CostModel(once)(), "the program that comes back is the dense one"


@pytest.mark.parametrize("rounds", [0, 21])
def test_rounds_out_of_range_are_refused(chain: Chain, rounds: int) -> None:
    with pytest.raises(OptionError, match="rounds"):
        fxprune.plan(chain, "2x6", flops=0.5, rounds=rounds)


# ------------------------------------------------------------ what follows the search


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        out: torch.Tensor = self.head(x.mean(1))
        return out


@pytest.fixture(scope="module")
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture(scope="module")
def tokens() -> list[torch.Tensor]:
    return [torch.randn(16, 6, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_a_head_scale_is_chosen_by_the_outputs(attention: Attention, tokens: list[torch.Tensor]) -> None:
    program = fxprune.plan(attention, "2x6x16", flops=0.6, data=tokens, align=1, head_scale="auto")
    told = next(note for note in program.notes if note.startswith("head scale"))
    chosen = float(told.split()[2])
    values = dict(part.split(": ") for part in told.partition("by scale: ")[2].rstrip(")").split(", "))
    assert set(map(float, values)) == set(HEAD_SCALES)
    assert float(values[f"{chosen:g}"]) == min(map(float, values.values()))
    assert program.need("plan").about["head_scale"] == chosen


def test_members_are_chosen_by_obs_when_there_is_recovery(attention: Attention, tokens: list[torch.Tensor]) -> None:
    def made(**options: Any) -> fxprune.Artifact:
        return fxprune.compile(attention, "2x6x16", flops=0.6, data=tokens, align=1, importance="fisher", **options)

    auto, scores, obs, bare = (made(), made(members="scores"), made(members="obs"), made(recover="none"))
    assert auto.plan.choices == obs.plan.choices
    assert scores.plan.choices == bare.plan.choices
    assert {k: len(c.keep) for k, c in auto.plan.choices.items()} == {
        k: len(c.keep) for k, c in scores.plan.choices.items()
    }
    assert "rank-within" in auto.report["pipeline"]
    assert "rank-within" not in scores.report["pipeline"]


def test_rearranged_masks_keep_the_counts(attention: Attention, tokens: list[torch.Tensor]) -> None:
    plain, other = (
        fxprune.compile(
            attention,
            "2x6x16",
            flops=0.5,
            data=tokens,
            align=1,
            importance="fisher",
            recover="scale{solver=lsmr}",
            rearrange=n,
        )
        for n in (0, 2)
    )
    assert {k: len(c.keep) for k, c in plain.plan.choices.items()} == {
        k: len(c.keep) for k, c in other.plan.choices.items()
    }
    assert "rearrange{rounds=2}" in other.report["pipeline"]
    assert "recover{method=scale,solver=lsmr}" in other.report["pipeline"]


def test_what_recovery_changed_is_what_onnx_computes(
    attention: Attention, tokens: list[torch.Tensor], tmp_path: Path
) -> None:
    artifact = fxprune.compile(attention, "2x6x16", flops=0.6, data=tokens, target="onnx", out=tmp_path / "small")
    assert artifact.report["recovery"]["method"] != "none"
    assert artifact.report["parity"]["ok"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recover": "ridgy"}, "did you mean 'ridge'"),
        ({"recover": "scale{solver=qr}"}, "unknown solver"),
        ({"recover": "ridge{steps=two}"}, "expected int"),
        ({"members": "best"}, "unknown way to choose members"),
        ({"members": "obs", "importance": "l2"}, "cannot say how many"),
        ({"head_scale": "big"}, "no head scale"),
        ({"head_scale": -1.0}, "must be positive"),
        ({"rearrange": -1}, "cannot be negative"),
        ({"rearrange": 1, "importance": "l2"}, "gradients"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    attention: Attention, tokens: list[torch.Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        fxprune.compile(attention, "2x6x16", flops=0.6, data=tokens, **options)
