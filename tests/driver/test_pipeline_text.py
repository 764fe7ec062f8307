"""Explicit pipelines: what a report states runs again and gives the same; what cannot run says so before it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.digits import tiny_vit

import fxprune
from fxprune import Artifact, Budget, OptionError
from fxprune.cli.demo import DigitsViT
from fxprune.driver.stated import PREPARATION, read_pipeline

SHAPE = "2x1x8x8"
PLAIN = "propagate-axes,find-groups,score-groups{criterion=l2},search-plan{budget=flops=0.5},slice-axes"


def same(one: Artifact, two: Artifact) -> None:
    assert one.plan.choices == two.plan.choices
    assert one.report["pipeline"] == two.report["pipeline"]
    assert one.report["budget"] == two.report["budget"]
    assert one.report["importance"] == two.report["importance"]
    a, b = one.module.state_dict(), two.module.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance": "fisher", "rearrange": 1, "recover": "scale"},
        {
            "flops": None,
            "params": 19_000,
            "seed": 3,
            "importance": "random",
            "freeze": ["blocks.0.mlp*"],
            "floor": ["*.ffn=0.25"],
            "align": 4,
            "prune": "ffn",
        },
    ],
    ids=["default", "ptf", "limits"],
)
def test_the_pipeline_of_a_report_runs_again(trained: DigitsViT, options: dict[str, object]) -> None:
    given: dict[str, object] = {"flops": 0.5, "data": data(), **options}
    one = fxprune.compile(trained, **given)  # type: ignore[arg-type]
    seed = int(str(given.get("seed", 0)))
    two = fxprune.compile(trained, data=given["data"], pipeline=one.report["pipeline"], seed=seed)
    same(one, two)
    if one.report.get("recovery") is not None:
        assert {**one.report["recovery"], "seconds": 0} == {**two.report["recovery"], "seconds": 0}


def test_text_in_the_issue_runs_and_is_prepared_by_itself() -> None:
    made = fxprune.compile(tiny_vit().eval(), SHAPE, pipeline=PLAIN)
    assert made.report["cost"]["ratio"]["flops"] <= 0.5
    assert made.report["pipeline"].startswith(",".join(PREPARATION))
    assert made.report["options"]["pipeline"] == PLAIN
    with pytest.warns(fxprune.FxpruneWarning, match="generated inputs"):
        fxprune.plan(tiny_vit().eval(), SHAPE, pipeline=PLAIN.replace("l2", "fisher"))


def test_the_budget_may_come_from_outside() -> None:
    text = PLAIN.replace("{budget=flops=0.5}", "")
    stated = read_pipeline(text, Budget("flops", 0.5))
    assert stated.budget == Budget("flops", 0.5)
    assert read_pipeline(PLAIN).budget == Budget("flops", 0.5)
    model = tiny_vit().eval()
    one, two = (fxprune.plan(model, SHAPE, pipeline=t, flops=f) for t, f in ((text, 0.5), (PLAIN, None)))
    assert one.need("plan").choices == two.need("plan").choices


def test_plan_stops_before_slicing_and_writes(tmp_path: Path) -> None:
    program = fxprune.plan(tiny_vit().eval(), SHAPE, pipeline=PLAIN, out=tmp_path / "plan.json")
    assert program.need("plan").about["pipeline"].endswith("search-plan{budget=flops=0.5}")
    assert json.loads((tmp_path / "plan.json").read_text())["groups"]


SEARCH = "search-plan{budget=flops=0.5}"
WRONG = {
    "": "empty",
    "propagate-axes,find-group,search-plan": "did you mean 'find-groups'",
    "propagate-axes,find-groups{algin=4}": "did you mean 'align'",
    "propagate-axes,find-groups{align=four}": "expected int",
    "propagate-axes,find-groups{freeze=a}": "not a list",
    "propagate-axes,find-groups,score-groups{criterion=tailor}": "did you mean 'taylor'",
    "propagate-axes,find-groups,score-groups,search-plan": "needs the option 'budget'",
    "propagate-axes,find-groups,score-groups,search-plan{budget=0.5}": "not a budget",
    "propagate-axes,find-groups,score-groups,search-plan{budget=flops=2}": "at most 1",
    "propagate-axes,find-groups,score-groups,search-plan{budget=flops=0.5": "cannot be read",
    "find-groups,propagate-axes": "put propagate-axes before it",
    f"propagate-axes,find-groups,{SEARCH}": "put score-groups before it",
    "propagate-axes,find-groups,score-groups": "no pass of the pipeline makes a plan",
    "propagate-axes,find-groups,score-groups,recover,slice-axes": "needs plan",
    f"{PLAIN},propagate-axes,slice-axes": "slices twice",
    f"propagate-axes,find-groups,score-groups,{SEARCH},merge-tokens,slice-axes": "put plan-tokens",
    f"{PLAIN},find-blocks": "no pass of the pipeline plans tiles",
    f"propagate-axes,find-groups,score-groups,{SEARCH},start-round,slice-axes": "not joined",
    f"{PLAIN},start-round": "'start-round' stands behind slice-axes",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_run_is_refused_before_the_model_is_loaded(text: str) -> None:
    with pytest.raises(OptionError, match=WRONG[text]) as caught:
        fxprune.compile("no-such-model.pt", pipeline=text)
    assert "pipeline=" in str(caught.value)


def test_facts_that_a_transform_drops_are_missed_when_it_has_run() -> None:
    text = f"propagate-axes,find-groups,score-groups,{SEARCH},unfuse,slice-axes"
    with pytest.raises(OptionError, match=r"unfuse|slice-axes|needs") as caught:
        fxprune.compile(tiny_vit().eval(), SHAPE, pipeline=text)
    assert "put" in caught.value.cure or caught.value.why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flops": 0.5}, "budget is given twice"),
        ({"importance": "l1"}, "importance= say the same"),
        ({"recover": "ridge"}, "recover="),
        ({"floor": 0.3}, "floor="),
        ({"freeze": ["a*"]}, "freeze="),
        ({"tokens": "tome"}, "tokens="),
        ({"search": "dynamic"}, "search="),
        ({"plan": "p.json"}, "plan or a pipeline"),
    ],
)
def test_options_that_the_passes_state_are_not_given_beside_them(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxprune.compile("no-such-model.pt", pipeline=PLAIN, **options)  # type: ignore[arg-type]


def test_recovery_without_data_is_an_error() -> None:
    with pytest.raises(OptionError, match="recovery needs data"):
        fxprune.compile(tiny_vit().eval(), SHAPE, pipeline=PLAIN.replace("slice", "recover{method=ridge},slice"))
