"""Passes that state a decision instead of making one: rounds, token counts, kept counts."""

from __future__ import annotations

import pytest
import torch
from support.token_models import TokenViT, scrambled
from torch import nn

from fxprune.errors import InternalError, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.find_token_sites import FindTokenSites
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.analysis.start_round import StartRound
from fxprune.passes.search.keep_counts import KeepCounts, counts_of
from fxprune.passes.search.plan_tokens import PlanTokens
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.passes.transform.join_rounds import JoinRounds
from fxprune.passes.transform.slice_axes import SliceAxes


def found(floor: float = 0.1) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)).eval()
    return Pipeline((PropagateAxes(), FindGroups(align=4, floor=floor), ScoreGroups("l2"))).run(
        capture(model, (torch.randn(2, 6),))
    )


@pytest.fixture
def program() -> Program:
    return found()


def another(program: Program, share: float) -> Program:
    passes = (
        StartRound(),
        SliceAxes(),
        PropagateAxes(),
        FindGroups(inherit=True),
        ScoreGroups("l2"),
        SearchPlan(Budget("flops", share)),
    )
    return Pipeline(passes, start=("axes", "groups", "scores", "plan")).run(program)


def test_a_joined_plan_leaves_what_the_rounds_left(program: Program) -> None:
    at = another(another(SearchPlan(Budget("flops", 0.8)).run(program), 0.6), 0.4)
    last = SliceAxes().run(at)
    joined = JoinRounds().run(at)
    once = SliceAxes().run(joined)
    assert {n: t.shape for n, t in once.tensors.items()} == {n: t.shape for n, t in last.tensors.items()}
    assert all(torch.equal(last.tensors[n], t) for n, t in once.tensors.items())
    assert joined.need("plan").about["rounds"] == 3
    assert joined.need("plan").about["predicted"]["flops"] <= 0.4 * CostModel(program)().flops
    assert joined.whole is None
    assert joined.exported is program.exported
    assert joined.need("scores") is program.need("scores")


def test_limits_of_later_rounds_are_those_of_the_whole() -> None:
    program = found(floor=0.5)
    at = another(SearchPlan(Budget("flops", 0.7)).run(program), 0.5)
    assert {g.name: g.granularity for g in at.need("groups")} == {g.name: g.granularity for g in program.need("groups")}
    floors = {g.name: g.floor for g in at.need("groups") if g.prunable}
    assert floors == {g.name: g.floor for g in program.need("groups") if g.name in floors} != {}


def test_rounds_that_did_not_start(program: Program) -> None:
    planned = SearchPlan(Budget("flops", 0.8)).run(program)
    with pytest.raises(OptionError, match="no rounds to join"):
        JoinRounds().run(planned)
    with pytest.raises(OptionError, match="no limits to inherit"):
        FindGroups(inherit=True).run(program)
    with pytest.raises(OptionError, match="not both"):
        FindGroups(inherit=True, floor=0.3)


def test_counts_of_a_search_give_its_plan(program: Program) -> None:
    plan = SearchPlan(Budget("flops", 0.5)).run(program).need("plan")
    stated = KeepCounts(counts_of(plan)).run(program).need("plan")
    assert plan.choices
    assert stated.choices == plan.choices
    assert stated.about["predicted"] == plan.about["predicted"]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ("0:ffn=3", "0:ffn=3(.|\n)*multiples of 4"),
        ("0:ffn=44", "4 to 40 may stay"),
        ("0:fn=4", "did you mean '0:ffn'"),
        ("0:ffn", "write GROUP=N"),
        ("=4", "write GROUP=N"),
    ],
)
def test_counts_that_a_group_cannot_have(program: Program, count: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        KeepCounts((count,)).run(program)


def test_token_counts_are_planned_to_the_letter_and_searched_behind() -> None:
    program = Pipeline((PropagateAxes(), FindGroups(align=1), FindTokenSites(unmerge=True), ScoreGroups("l2"))).run(
        capture(scrambled(TokenViT(read="grid", depth=2)), (torch.randn(2, 3, 32, 32),))
    )
    sites = [s.name for s in program.need("tokens").usable]
    cut = SearchPlan(Budget("flops", 0.9)).run(program)
    planned = PlanTokens("tome", (0, 3)).run(cut)
    plan = planned.need("plan")
    assert (plan.tokens.reducer, plan.tokens.removed, plan.tokens.unmerge) == ("tome", {sites[1]: 3}, True)
    assert plan.elements == cut.need("plan").choices
    with pytest.raises(InternalError, match="reduced program"):
        SearchPlan(Budget("flops", 0.9)).run(planned)
    none = PlanTokens("tome", (0, 0)).run(program)
    assert none.need("plan").tokens is None
    assert SearchPlan(Budget("flops", 0.9)).run(none).need("plan").choices == cut.need("plan").choices
    for counts, message in (((1,), "1 counts, 2 attentions"), ((99, 0), "99 of 17 at"), ((1, 2, 3), "one count per")):
        with pytest.raises(OptionError, match=message):
            PlanTokens("tome", counts).run(program)
