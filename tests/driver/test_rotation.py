"""A width that may be cut is cut in its principal basis, by a run, its replay, and where its plan is applied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.replaying import QUIET, assert_same, assert_same_weights, batches, vit

import fxprune
from fxprune import Artifact, CompressionPlan
from fxprune.errors import PlanError

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
ASKED: dict[str, Any] = {"prune": "heads,ffn,width", "recover": "none", "align": 4, "floor": 0.1, **QUIET}


@pytest.fixture(scope="module")
def cut() -> Artifact:
    return fxprune.compile(vit(), X, flops=0.3, data=batches((1, 8, 8)), importance="fisher", **ASKED)


def test_a_run_rotates_proves_it_and_fuses_the_norms(cut: Artifact) -> None:
    report = cut.report
    limits = "find-groups{align=4,floor=0.1}"
    assert f"{limits},rotate-width,propagate-axes,{limits},score-groups" in report["pipeline"]
    assert "spell-out-tokens,fuse-norms,propagate-axes" in report["pipeline"]
    (link,) = [one for one in report["proof"] if "the one that is cut" in one["compared"]]
    assert link["max_rel"] < 1e-5
    (name,) = cut.plan.rotated
    choice = cut.plan.elements[name]
    assert (choice.kind, choice.basis) == ("width", "data")
    assert len(choice.keep) < 16
    assert any("principal basis" in note for note in report["notes"])
    norms = [n for n in cut.module.graph.nodes if n.target is torch.ops.aten.rms_norm.default]
    assert len(norms) == 5
    assert not [n for n in cut.module.graph.nodes if n.target is torch.ops.aten.rsqrt.default]


def test_its_pipeline_gives_the_same_weights(cut: Artifact) -> None:
    data = batches((1, 8, 8))
    again = fxprune.compile(vit(), X, data=data, pipeline=cut.report["pipeline"], **QUIET)
    assert_same(cut.plan, again.plan)
    assert_same_weights(cut, again)
    assert [one["compared"] for one in again.report["proof"]] == [one["compared"] for one in cut.report["proof"]]


def test_its_plan_rotates_again_on_the_data(cut: Artifact) -> None:
    again = fxprune.compile(vit(), X, plan=cut.plan, data=batches((1, 8, 8)), recover="none", **QUIET)
    assert torch.allclose(again.module(X), cut.module(X), atol=1e-5)
    replayed = fxprune.compile(
        vit(), X, plan=cut.plan, data=batches((1, 8, 8)), pipeline=again.report["pipeline"], **QUIET
    )
    assert_same_weights(again, replayed)


def test_a_plan_that_says_so_in_its_about_replays_too(cut: Artifact) -> None:
    """As plans were written before choices of widths said their basis; so were the pipelines that name them."""
    bare = {name: replace(c, basis="") if c.kind == "width" else c for name, c in cut.plan.elements.items()}
    old = CompressionPlan(bare, {**cut.plan.about, "rotated": list(cut.plan.rotated)})
    plan = CompressionPlan.from_json(old.to_json())
    assert plan.choices == cut.plan.choices
    assert (plan.digest, plan.aliases) == (cut.plan.digest, (old.digest,))
    assert "rotated" not in plan.about
    data, options = batches((1, 8, 8)), {"recover": "none", **QUIET}
    again = fxprune.compile(vit(), X, plan=plan, data=data, **options)
    text = again.report["pipeline"].replace(plan.digest, old.digest)
    assert old.digest in text
    assert_same_weights(again, fxprune.compile(vit(), X, plan=plan, data=data, pipeline=text, **QUIET))


def test_a_plan_of_another_basis_has_the_line(cut: Artifact) -> None:
    text = fxprune.compile(vit(), X, plan=cut.plan, data=batches((1, 8, 8)), recover="none", **QUIET).report["pipeline"]
    bare = CompressionPlan.from_json(cut.plan.to_json().replace(', "basis": "data"', ""), "plan.json")
    with pytest.raises(PlanError, match="rotate-width here, and not there") as caught:
        fxprune.compile(
            vit(), X, plan=bare, data=batches((1, 8, 8)), pipeline=text.replace(cut.plan.digest, bare.digest), **QUIET
        )
    assert "plan.json:" in caught.value.where


def test_its_plan_needs_data(cut: Artifact) -> None:
    with pytest.raises(PlanError, match="found from data") as caught:
        fxprune.apply(vit(), cut.plan, X, **QUIET)
    assert "compile with the plan" in caught.value.cure


def test_without_data_width_is_cut_as_the_model_has_it() -> None:
    made = fxprune.compile(vit(), X, flops=0.4, importance="l2", **ASKED)
    assert "rotate-width" not in made.report["pipeline"]
    assert not made.plan.rotated
    assert any("no data to find a better one" in note for note in made.report["notes"])
    again = fxprune.apply(vit(), made.plan, X, **QUIET)
    assert_same_weights(made, again)


def test_rounds_are_joined_in_one_basis() -> None:
    options = {**ASKED, "recover": "refit"}
    made = fxprune.compile(vit(), X, flops=0.3, rounds=2, data=batches((1, 8, 8)), importance="fisher", **options)
    assert made.report["cost"]["ratio"]["flops"] <= 0.3
    assert made.report["masked"]["max_rel"] < 1e-4


def test_a_budget_of_parameters_unties_nothing(cut: Artifact) -> None:
    made = fxprune.compile(vit(), X, params=0.4, data=batches((1, 8, 8)), importance="fisher", **ASKED)
    assert "rotate-width{untie=false}" in made.report["pipeline"]
