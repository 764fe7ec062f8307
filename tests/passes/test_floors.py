"""Floors and multiples that nobody asked for give way where the budget is out of reach otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.artifact.explain import explain
from fxprune.errors import BudgetInfeasible
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.group import Kind, Tie
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.floors import lower_floors
from fxprune.passes.search.search_plan import SearchPlan

KINDS = (Kind.FFN,)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 16), nn.ReLU(), nn.Linear(16, 4)
    ).eval()


def scored(**limits: Any) -> Program:
    passes = (PropagateAxes(), FindGroups(**limits), ScoreGroups("l2"))
    return Pipeline(passes).run(capture(net(), (torch.randn(2, 4),)))


def reach(program: Program, floors: bool = True) -> float:
    """The least share of the cost, at the floors."""
    groups = [g for g in program.need("groups") if g.prunable]
    model = CostModel(program)
    return model({g.axis: g.floor for g in groups}).flops / model().flops if floors else 0.0


def test_within_the_floors_nothing_gives_way() -> None:
    program = scored()
    found = SearchPlan(Budget("flops", 0.3), KINDS).run(program)
    for group in (g for g in program.need("groups") if g.prunable):
        assert len(found.need("plan").kept(group)) >= group.floor
    assert not any("below the usual floor" in note for note in found.notes)


@pytest.mark.parametrize("share", [0.012, 0.006, 0.003])
def test_below_them_one_step_stays_then_finer_ones_and_a_note_says_so(share: float) -> None:
    program = scored()
    assert reach(program) > share
    found = SearchPlan(Budget("flops", share), KINDS).run(program)
    plan, model = found.need("plan"), CostModel(program)
    assert model(plan.sizes(program.need("groups"))).flops <= share * model().flops
    below = [g for g in program.need("groups") if g.prunable and len(plan.kept(g)) < g.floor]
    (note,) = [n for n in found.notes if "below the usual floor" in n]
    assert f"{len(below)} of 3 groups" in note
    assert all(len(plan.kept(g)) >= 1 for g in program.need("groups"))


@pytest.mark.parametrize("limits", [{"floor": 0.1, "align": 8}, {"floor": 0.1}, {"floors": ("ffn=0.1",)}])
def test_what_was_asked_for_stays(limits: dict[str, Any]) -> None:
    program = scored(**limits)
    assert all(g.least is None for g in program.need("groups") if g.prunable)
    with pytest.raises(BudgetInfeasible, match="reachable"):
        SearchPlan(Budget("flops", 0.003), KINDS).run(program)


def test_asked_multiples_stay_where_floors_give_way() -> None:
    program = scored(align=8)
    found = SearchPlan(Budget("flops", 0.012), KINDS).run(program).need("plan")
    assert all(len(c.keep) % 8 == 0 for c in found.elements.values())
    with pytest.raises(BudgetInfeasible):
        SearchPlan(Budget("flops", 0.003), KINDS).run(program)


def test_each_is_lower_than_the_one_before_and_the_last_are_single_elements() -> None:
    groups = [g for g in scored().need("groups") if g.prunable]
    before = [g.floor for g in groups]
    assert before == [16, 16, 8]
    for now in lower_floors(groups):
        assert all(a.floor <= b for a, b in zip(now, before, strict=True))
        assert all(g.levels()[0] == g.floor for g in now)
        before = [g.floor for g in now]
    assert before == [1, 1, 1]
    tie = Tie.of("both", groups[:2])
    assert (tie.least, tie.strict, tie.floor) == (8, False, 16)


def test_low_floors_may_be_asked_for_and_are_part_of_the_text() -> None:
    program = scored()
    low = SearchPlan(Budget("flops", 0.1), KINDS, low=True)
    assert "low=true" in str(low)
    model = CostModel(program)
    for search in (low, SearchPlan(Budget("flops", 0.1), KINDS)):
        assert model(search.run(program).need("plan").sizes(program.need("groups"))).flops <= 0.1 * model().flops


def test_rounds_inherit_them_and_explain_says_why(tmp_path: Any) -> None:
    x = torch.randn(8, 4)
    quiet: dict[str, Any] = {"on_event": lambda _: None}
    made = fxprune.compile(net(), x[:2], flops=0.008, rounds=2, out=tmp_path / "a", **quiet)
    assert made.report["cost"]["ratio"]["flops"] <= 0.008
    again = fxprune.compile(net(), x[:2], pipeline=made.report["pipeline"], **quiet)
    assert again.plan.choices == made.plan.choices
    entry = min(made.report["groups"], key=lambda g: g["kept"] / g["floor"])
    assert entry["kept"] < entry["floor"]
    assert any("below its floor" in line for line in explain(tmp_path / "a", entry["group"])["because"])
