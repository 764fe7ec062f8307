"""What whole steps leave of a budget is filled by finer ones, or said."""

from __future__ import annotations

import pytest
import torch
from support.laws import analysed
from torch import Tensor, nn

from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.finer import SLACK
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.report.entries import group_entries


class Small(nn.Module):
    """Its cost hangs on one layer of 32 channels: 16 of them cost a little more than half."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(64, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x).mean((2, 3))
        return self.head(features), features


def searched(budget: float, **limits: object) -> tuple[Program, float, list[int]]:
    """(program with its plan, share of the MACs, counts kept)"""
    passes = (PropagateAxes(), FindGroups(**limits), ScoreGroups("l2"), SearchPlan(Budget("flops", budget)))  # type: ignore[arg-type]
    program = Pipeline(passes).run(capture(Small().eval(), (torch.randn(2, 3, 16, 16),)))
    choices = program.need("plan").choices
    kept = {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}
    model = CostModel(program)
    return program, model(kept).flops / model().flops, list(kept.values())


def test_finer_steps_fill_what_eights_leave() -> None:
    program, share, kept = searched(0.5)
    assert kept == [15]  # 16 cost 0.5002, and 8 a quarter
    assert 0.46 < share <= 0.5
    assert program.need("plan").about["method"] == "two-class, then steps of 1"
    assert program.notes == ()


def test_the_steps_that_were_taken_are_what_the_report_says_of_a_group() -> None:
    program, _, _ = searched(0.5)
    plan = program.need("plan")
    (entry,) = (e for e in group_entries(program, plan, program.scores, ["channel"]) if e["kept"] < e["size"])
    assert (entry["granularity"], entry["kept"]) == (1, 15)
    assert plan.about["halved"] == 3
    coarse, _, _ = searched(0.5, align=8)
    assert "halved" not in coarse.need("plan").about
    entries = group_entries(coarse, coarse.need("plan"), coarse.scores, ["channel"])
    assert {e["granularity"] for e in entries} == {8}


def test_multiples_that_were_asked_for_stay_and_the_note_names_those_that_would_use_the_rest() -> None:
    program, share, kept = searched(0.5, align=8)
    assert kept == [8]
    assert share < 0.26
    assert program.notes == ("50% of the budget is left, because counts are multiples of 8: align=1 would leave 6%",)
    assert searched(0.5, align=1)[0].notes == ()


def test_whole_steps_that_fit_stay_whole() -> None:
    program, _, kept = searched(0.501)
    assert kept == [16]
    assert program.need("plan").about["method"] == "two-class"


def test_a_pattern_that_asks_for_multiples_is_kept() -> None:
    assert searched(0.5, aligns=("channels=4",))[2] == [12]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", ["vit", "resnet18", "gqa_sdpa", "convnext"])
@pytest.mark.parametrize("ratio", [0.8, 0.55])
def test_little_is_left_wherever_single_steps_are_small(name: str, ratio: float) -> None:
    """Within the budget always; and what is left is less than 2 %, or no single element more would fit."""
    program = analysed(name)
    passes = (ScoreGroups("l2"), SearchPlan(Budget("flops", ratio)))
    planned = Pipeline(passes, start=("axes", "groups")).run(program)
    choices, model = planned.need("plan").choices, CostModel(program)
    kept = {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}
    limit = ratio * model().flops
    assert model(kept).flops <= limit
    for group in program.need("groups"):
        if limit - model(kept).flops > SLACK * limit and group.name in choices:
            more = min(n for n in (*group.levels(), kept[group.axis] + 1) if n > kept[group.axis])
            one = more if str(group.kind) in ("head", "kv") else kept[group.axis] + 1
            assert model({**kept, group.axis: one}).flops > limit, group.name
