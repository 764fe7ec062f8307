"""SearchBlocks on real programs: budgets, floors, what cannot be reached, and 2:4."""

from __future__ import annotations

import pytest
import torch
from support import tiled

from fxprune.errors import BudgetInfeasible, NothingToPrune, OptionError
from fxprune.ir.cost import Budget, CostModel
from fxprune.passes.search.search_blocks import SearchBlocks


@pytest.mark.parametrize("criterion", ["lsp", "magnitude"])
@pytest.mark.parametrize("allocation", ["auto", "kkt", "lsp", "uniform"])
def test_the_budget_is_met_within_one_tile(criterion: str, allocation: str) -> None:
    given = tiled.data(2)
    program = tiled.analysed(tiled.model(), given)
    dense = CostModel(program)().flops
    largest = max(g.macs for g in tiled.live(program).values())
    for ratio in (0.9, 0.6, 0.45):
        plan = tiled.planned(program, given, ratio, criterion, allocation=allocation).need("plan")
        effective = dense - sum(
            g.matrix.macs * (1 - plan.blocks[n].density) for n, g in tiled.live(program).items() if n in plan.blocks
        )
        assert ratio * dense - largest <= effective <= ratio * dense
        assert plan.about["predicted"]["flops"] == pytest.approx(effective)
        assert 0 < plan.about["power"]["share"] < 1
        assert plan.about["power"]["measured"] is False


def test_tiles_go_in_the_order_of_their_scores_and_floors_hold() -> None:
    given = tiled.data(2)
    program = tiled.planned(tiled.analysed(tiled.model(), given, floor=0.3), given, 0.5)
    for name, g in tiled.live(program).items():
        blocks = program.need("plan").blocks.get(name)
        if blocks is None:
            continue
        order = program.need("scores")[g.name].order
        count = int(blocks.kept.sum())
        assert count >= g.floor
        assert set(blocks.kept.flatten().nonzero()[:, 0].tolist()) == set(order[:count].tolist())


def test_budgets_that_tiles_cannot_meet_are_refused_with_the_reason() -> None:
    given = tiled.data(1)
    program = tiled.analysed(tiled.model(), given)
    with pytest.raises(BudgetInfeasible, match="out of reach") as error:
        tiled.planned(program, given, 0.05)
    assert "a classifier" in error.value.why
    assert "reachable" in error.value.why
    with pytest.raises(OptionError, match="a budget of params"):
        SearchBlocks(Budget("params", 0.5))
    with pytest.raises(OptionError, match="unknown allocation 'ktk'"):
        SearchBlocks(Budget("flops", 0.5), allocation="ktk")
    with pytest.raises(NothingToPrune, match="tiles"):
        tiled.planned(tiled.analysed(tiled.model(), given, freeze=("*",)), given)


def test_a_budget_that_is_met_already_zeroes_nothing() -> None:
    given = tiled.data(1)
    assert tiled.planned(tiled.analysed(tiled.model(), given), given, 1.0).need("plan").empty


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obert"])
def test_two_of_four_keeps_two_of_every_four_inputs(criterion: str) -> None:
    given = tiled.data(2)
    plan = tiled.planned(tiled.analysed(tiled.model(), given, "2:4"), given, criterion=criterion).need("plan")
    assert set(plan.blocks) == {"qkv.weight", "proj.weight", "up.weight", "down.weight"}
    for blocks in plan.blocks.values():
        whole = blocks.kept[:, : blocks.kept.shape[1] // 4 * 4].unflatten(1, (-1, 4))
        assert torch.all(whole.sum(-1) == 2)
