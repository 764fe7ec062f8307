"""A plan whose elements are in a basis: it says so, and who applies it makes the same basis, or says that it cannot."""

from __future__ import annotations

from typing import Any

import pytest
from support.replaying import EVERY, QUIET, assert_same_weights, batches
from support.runs import opened_run
from support.token_models import TokenViT, scrambled

import fxprune
from fxprune import CompressionPlan, Kind, PlanError
from fxprune.driver.decide import prepare
from fxprune.ir.cost import Budget
from fxprune.passes.transform.align_heads import AlignHeads
from fxprune.request.goal import Goal


def test_a_plan_says_its_basis_and_the_same_data_make_the_same_weights() -> None:
    make, shape = EVERY["queries"]
    x = batches(shape)
    options: Any = {"flops": 0.7, "prune": "qk,v", "align": 1, "recover": "none", **QUIET}
    one = fxprune.compile(make(), x[0][:2], data=x, **options)
    assert {c.basis for c in one.plan.elements.values()} == {"data"}
    assert ",align-heads,score-groups" in one.report["pipeline"]
    plan = CompressionPlan.from_json(one.plan.to_json())
    assert plan.choices == one.plan.choices
    assert plan.digest == one.plan.digest
    assert_same_weights(one, fxprune.compile(make(), x[0][:2], data=x, pipeline=one.report["pipeline"], **QUIET))
    assert_same_weights(one, fxprune.compile(make(), x[0][:2], data=x, plan=plan, recover="none", **QUIET))
    said: list[str] = []
    bare = fxprune.apply(make(), plan, x[0][:2], on_event=lambda event: said.append(str(event)))
    assert "align-heads{basis=weights},read-plan" in bare.report["pipeline"]
    assert any("the basis is by weights alone" in note for note in bare.report["notes"])
    replayed = fxprune.compile(make(), x[0][:2], plan=plan, pipeline=bare.report["pipeline"], **QUIET)
    assert_same_weights(bare, replayed)


def test_widths_beside_tokens_say_their_basis_and_their_plan_replays() -> None:
    """Tokens go first, and groups are found again behind them: they are in the same basis all the same."""
    model, (x, *data) = scrambled(TokenViT(depth=2)).eval(), batches((3, 32, 32))
    options: Any = {"data": data, "recover": "none", **QUIET}
    one = fxprune.compile(model, x[:2], flops=0.5, prune="tokens,qk,v", align=1, importance="fisher", **options)
    assert one.plan.tokens is not None
    assert {c.basis for c in one.plan.elements.values()} == {"data"}
    plan = CompressionPlan.from_json(one.plan.to_json(), "plan.json")
    assert_same_weights(one, fxprune.compile(model, x[:2], plan=plan, **options))


def test_a_plan_by_weights_stays_by_weights_whatever_data_there_are() -> None:
    make, shape = EVERY["queries"]
    x = batches(shape)
    one = fxprune.compile(make(), x[0][:2], flops=0.7, prune="qk,v", align=1, **QUIET)
    assert {c.basis for c in one.plan.elements.values()} == {"weights"}
    assert_same_weights(one, fxprune.apply(make(), one.plan, x[0][:2], **QUIET))
    assert_same_weights(one, fxprune.compile(make(), x[0][:2], data=x, plan=one.plan, recover="none", **QUIET))


def test_a_plan_of_another_basis_is_refused() -> None:
    make, shape = EVERY["queries"]
    x = batches(shape)[0][:2]
    plan = fxprune.compile(make(), x, flops=0.7, prune="qk,v", align=1, **QUIET).plan
    text = fxprune.apply(make(), plan, x, **QUIET).report["pipeline"]
    with pytest.raises(PlanError, match="elements of another basis") as caught:
        fxprune.compile(make(), x, plan=plan, pipeline=text.replace("align-heads{basis=weights},", ""), **QUIET)
    assert "align-heads" in str(caught.value)
    old = CompressionPlan.from_json(plan.to_json().replace('"basis": "weights", ', ""), "plan.json")
    assert not old.basis
    made = fxprune.apply(make(), old, x, **QUIET)  # as 0.1.0 cut it: elements of the model as it is
    assert "align-heads" not in made.report["pipeline"]
    with pytest.raises(PlanError, match=r"plan.json:\d+"):
        fxprune.compile(make(), x, plan=old, pipeline=text.replace(plan.digest, old.digest), **QUIET)
    with pytest.raises(PlanError, match="basis must be data or weights"):
        CompressionPlan.from_json(plan.to_json().replace('"basis": "weights"', '"basis": "luck"', 1))


def test_rounds_cut_in_the_basis_of_the_first() -> None:
    make, shape = EVERY["queries"]
    x = batches(shape)
    one = fxprune.compile(make(), x[0][:2], flops=0.6, prune="qk,v", align=1, rounds=2, data=x, recover="none", **QUIET)
    assert one.report["pipeline"].count("align-heads") == 1
    for choice in one.plan.elements.values():
        assert (choice.basis, choice.keep) == ("data", tuple(range(len(choice.keep))))
    assert_same_weights(one, fxprune.compile(make(), x[0][:2], data=x, plan=one.plan, recover="none", **QUIET))


def test_weights_that_other_graphs_share_stay_in_their_basis() -> None:
    make, shape = EVERY["queries"]
    run = opened_run(make(), batches(shape)[0][:2], batches(shape))
    goal = Goal(Budget("flops", 0.7), "l2", (Kind.QK, Kind.V), 1)
    assert "align-heads" in prepare(run, goal).pipeline
    assert "align-heads" not in prepare(run, goal, rewrite=False).pipeline


def test_a_rewrite_that_fails_leaves_the_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = EVERY["queries"]
    x = batches(shape)
    monkeypatch.setattr(AlignHeads, "apply", lambda *_: 1 / 0)
    with pytest.warns(fxprune.FxpruneWarning, match="stay in the model's own basis: .*ZeroDivisionError"):
        small = fxprune.compile(make(), x[0][:2], flops=0.7, prune="qk,v", align=1, data=x, seconds=0)
    assert "align-heads" not in small.report["pipeline"]
    assert small.report["cost"]["ratio"]["flops"] <= 0.7
