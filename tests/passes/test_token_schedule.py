"""Schedules: budgets met, caps kept, the order of removals, and the published counts."""

from __future__ import annotations

import pytest
import torch
from support.token_models import TokenViT, analysed, scrambled

from fxprune.ir.axis import Axis
from fxprune.ir.cost import CostModel
from fxprune.ir.program import Program
from fxprune.passes.search.token_schedule import TokenCosts, decreasing, eliminate, profile, round_counts


def half(tokens: int, protected: int) -> int:
    return (tokens - protected) // 2


def all_but_one(tokens: int, protected: int) -> int:
    return tokens - protected - 1


@pytest.fixture(scope="module")
def deit() -> Program:
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    import timm

    return analysed(timm.create_model("deit_small_patch16_224").eval(), size=224)


def test_published_counts_of_deit_small(deit: Program) -> None:
    """Methods 0.3, 5, 6 and vectors 11.5, 11.14: 4.599 dense, ToMe r=13 2.703, PPT r=50 at 3, 6, 9 2.941 GMACs."""
    costs = TokenCosts.of(deit, {})
    assert costs.total([0] * 12) == CostModel(deit)().flops == 4_598_882_304
    assert costs.total([13] * 12) == 2_702_701_056
    ppt = costs.fits([0, 0, 0, 50, 0, 0, 50, 0, 0, 50, 0, 0], half, later=False)
    assert ppt == [0, 0, 0, 50, 0, 0, 50, 0, 0, 48, 0, 0]
    fixed = 196 * 768 * 384 + 384 * 1000  # patch embedding and classifier
    assert costs.total(ppt) == 2_940_979_200
    blocks = costs.total([0] * 12) - fixed
    assert blocks == 12 * (6 * 24_333_440 + 1536 * 151_296)
    one_less = blocks - (costs.total([1, *[0] * 11]) - fixed)
    # eleven full blocks and the feed-forward layer of the first
    assert one_less == 11 * 2_071_296 + 1536 * 2 * 384


def small() -> tuple[Program, TokenCosts]:
    program = analysed(scrambled(TokenViT(front=1, depth=4)))
    return program, TokenCosts.of(program, {})


def test_costs_are_the_polynomial_at_every_count_and_with_pruned_groups() -> None:
    program, _ = small()
    flow = program.need("tokens")
    heads = {g.axis: 2 for g in program.need("groups") if str(g.kind) == "head"}
    costs = TokenCosts.of(program, heads)
    axes = [s.axis for s in flow.usable]
    model = CostModel(program, flow.axes, also=axes)
    for removed in ([0, 0, 0, 0], [3, 0, 2, 1], [8, 4, 2, 1]):
        left, kept = 16, dict[Axis, int]()
        for axis, r in zip(axes, removed, strict=True):
            left -= r
            kept[axis] = left
        assert costs.total(removed) == model({**heads, **kept}).flops


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("weights", [[1.0] * 4, decreasing(4)])
def test_profiles_meet_the_budget_with_as_few_as_possible(share: float, weights: list[float]) -> None:
    _, costs = small()
    limit = share * costs.total([0] * 4)
    removed = profile(weights, costs, limit, half)
    assert costs.total(removed) <= limit
    assert removed == costs.fits(removed, half)
    # one token less at the first place that gives any would be too dear
    first = next(i for i, r in enumerate(removed) if r)
    assert costs.total([r - (i == first) for i, r in enumerate(removed)]) > limit


def test_decreasing_weights() -> None:
    assert decreasing(5) == [2.0, 1.5, 1.0, 0.5, 0.0]
    _, costs = small()
    removed = profile(decreasing(4), costs, 0.75 * costs.total([0] * 4), half)
    assert removed == sorted(removed, reverse=True)


def test_what_the_cap_refuses_goes_later() -> None:
    _, costs = small()
    assert costs.fits([12, 0, 0, 0], half) == [8, 4, 0, 0]
    assert costs.fits([16, 0, 0, 0], half) == [8, 4, 2, 1]
    assert costs.fits([12, 0, 0, 0], all_but_one) == [12, 0, 0, 0]


def test_equal_scores_cut_the_earliest_site_first_by_cost_and_by_index_without() -> None:
    _, costs = small()
    scores = [[1.0] * 16] * 4
    limit = costs.total([3, 0, 0, 0])
    assert eliminate(scores, costs, limit, half) == [3, 0, 0, 0]
    assert eliminate(scores, costs, limit, half, aware=False) == [3, 0, 0, 0]


def test_dear_sites_are_left_alone_and_budgets_are_met() -> None:
    _, costs = small()
    scores = [[100.0] * 16, [100.0] * 16, [float(j + 1) for j in range(16)], [float(j + 1) for j in range(16)]]
    limit = costs.total([0, 0, 5, 0])
    assert eliminate(scores, costs, limit, half) == [0, 0, 5, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        drawn = torch.rand(4, 16, generator=generator).tolist()
        for share in (0.9, 0.7, 0.5):
            removed = eliminate(drawn, costs, share * costs.total([0] * 4), half)
            assert costs.total(removed) <= share * costs.total([0] * 4)
            assert removed == costs.fits(removed, half)


def test_a_token_that_went_late_may_go_earlier() -> None:
    _, costs = small()
    # token 0 costs nothing at the last site, and is still the cheapest at the first
    scores = [[2.0] + [50.0] * 15, [60.0] * 16, [60.0] * 16, [0.0] + [60.0] * 15]
    removed = eliminate(scores, costs, costs.total([1, 0, 0, 0]), half)
    assert removed == [1, 0, 0, 0]


def test_a_budget_beyond_reach_takes_all_that_can_go() -> None:
    _, costs = small()
    assert profile([1.0] * 4, costs, 0.0, half) == costs.fits([16] * 4, half)
    assert eliminate([[1.0] * 16] * 4, costs, 0.0, half) == costs.fits([16, 0, 0, 0], half)


def test_the_cost_of_reducing_counts() -> None:
    program, plain = small()
    costs = TokenCosts.of(program, {}, "flops", lambda site, left, r: 1000 * r + left + site)
    assert costs.total([2, 0, 1, 0]) == plain.total([2, 0, 1, 0]) + (2000 + 17) + (1000 + 15 + 2)


@pytest.mark.parametrize("removed", [[3, 1, 2, 2], [0, 5, 0, 3], [1, 1, 1, 1]])
def test_tokens_left_are_multiples_where_they_can_be(removed: list[int]) -> None:
    _, costs = small()
    limit = float(costs.total(removed))
    found = round_counts(removed, costs, limit, half, 4)
    assert costs.total(found) <= limit
    assert found == costs.fits(found, half)
    left = 17
    for r in found:
        left -= r
        assert left == 17 or left % 4 == 0
