"""Faults of 0.1.0 that the rebuilt run mends: what was asked for is used, wherever it is used a second time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import opened_run
from torch import nn

import fxprune
from fxprune.driver import decide
from fxprune.driver.decide_tiles import decide_tiles
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.plan import CompressionPlan
from fxprune.passes.search.rearrange import Rearrange
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.request.goal import Goal

QUIET: dict[str, Any] = {"on_event": lambda event: None, "seconds": 0}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 16)).eval()


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=generator)
    return [torch.randn(64, 16, generator=generator) @ mixing for _ in range(count)]


def test_a_plan_that_is_given_is_repaired_on_the_data_that_are_given() -> None:
    data = batches()
    plan = fxprune.plan(net(), data[0], flops=0.5)
    plain = fxprune.apply(net(), plan.need("plan"), data[0], **QUIET)
    fitted = fxprune.compile(net(), data[0], plan=plan.need("plan"), data=data, **QUIET)
    bare = fxprune.compile(net(), data[0], plan=plan.need("plan"), data=data, recover="none", **QUIET)
    assert fitted.plan.elements == plain.plan.elements
    assert fitted.report["recovery"]["method"] != "none"
    assert "recovery" not in bare.report
    x, dense = batches(5)[-1], net()
    with torch.no_grad():
        errors = [float((a.module(x) - dense(x)).norm()) for a in (fitted, plain, bare)]
    assert errors[0] < 0.8 * errors[1]
    assert errors[1] == pytest.approx(errors[2])


def test_corrected_searches_are_those_that_were_asked_for() -> None:
    goal = Goal(Budget("flops", 0.5), "fisher", ("ffn",), 8, rearrange=2, search="lagrangian")
    run = decide.prepare(opened_run(net(), batches()[0], batches(1)), goal)
    decided = decide.decide_on(run, goal)
    searches = [s.ran for s in decided.run.steps if isinstance(s.ran, SearchPlan)]
    assert {s.method for s in searches} == {"lagrangian"}
    assert isinstance(decided.run.steps[-1].ran, Rearrange)
    again = decide._search_again(decided.run.program, goal).need("plan")
    assert again.about["method"] == decided.run.program.need("plan").about["method"]
    assert again.about["method"].startswith("lagrangian")


def test_tiles_take_as_many_made_up_samples_as_were_asked_for() -> None:
    request = fxprune.driver.api.Invocation.of("compile", asked()).request
    run = opened_run(net(), batches()[0], samples=request.samples, tiles=request.tiles)
    run = decide.find_groups(run).but(plan=CompressionPlan())
    tiled = decide_tiles(run.on(run.program.without_facts()), (), CostModel(run.program)())
    assert tiled.run.data is not None
    assert tiled.run.data.generated
    assert tiled.run.data.samples == 24


def asked() -> dict[str, Any]:
    return {"model": net(), "flops": 0.6, "blocks": "16x16{ends=true}", "importance": "lsp", "samples": 24}
