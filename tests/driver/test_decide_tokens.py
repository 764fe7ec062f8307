"""How many tokens go where: what the guard keeps, and what it believes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import opened_run

from fxprune.cli.demo import Digits, DigitsViT
from fxprune.data import memory
from fxprune.data.batch import Batch
from fxprune.driver.decide_tokens import Decision
from fxprune.driver.run import find_groups
from fxprune.ir.cost import Budget
from fxprune.ir.group import Kind
from fxprune.passes.analysis.importance import damage
from fxprune.passes.analysis.importance.damage import Reference, divergence, divergences
from fxprune.passes.search.token_schedule import eliminate, profile
from fxprune.passes.transform.merge_tokens import trial
from fxprune.request.goal import Goal
from fxprune.request.tokens import TokenGoal


def decision(model: DigitsViT, digits: Digits, text: str, flops: float = 0.8) -> Decision:
    wish = TokenGoal(text)
    run = find_groups(opened_run(model, digits.test_images[:2]), tokens=True)
    asked = Goal(Budget("flops", flops), "l2", (Kind.TOKEN,), 1, tokens=wish)
    return Decision(run, asked, wish, run.program, [Batch((digits.train_images[:64],))])


def constant(one: Decision) -> list[int]:
    return profile([1.0] * len(one.flow.usable), one.costs, one.limit, one.tokens.method.cap)


def removed(one: Decision) -> list[int]:
    plan = one.within(one.limit)
    return [plan.removed.get(s.name, 0) for s in one.flow.usable]


def test_a_schedule_takes_the_constant_ones_place_only_where_it_is_clearly_better(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = decision(trained, digit_data, "tome{schedule=optin,guard=false}")
    raw, same = removed(free), constant(free)
    assert raw != same
    found: dict[tuple[int, ...], torch.Tensor] = {}
    monkeypatch.setattr(Decision, "damages", lambda self, r: found[tuple(r)])
    noise = torch.linspace(-1, 1, 64).double()
    for better, kept in ((1.0, raw), (0.05, same), (-1.0, same)):
        found.update({tuple(same): 2 + 0 * noise, tuple(raw): 2 - better + noise})
        assert removed(decision(trained, digit_data, "tome{schedule=optin}")) == kept


def test_the_schedule_is_never_farther_from_dense_than_the_constant_one(trained: DigitsViT, digit_data: Digits) -> None:
    for schedule in ("optin", "removal", "auto"):
        one = decision(trained, digit_data, f"tome{{schedule={schedule},improve=2}}", 0.7)
        assert one.damage(removed(one)) <= one.damage(constant(one))


def test_few_samples_decide_by_the_mean_alone(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    one: Any = decision(trained, digit_data, "tome")
    monkeypatch.setattr(Decision, "damages", lambda self, r: torch.tensor([float(r[0])]))
    assert one.surely([0, 0], [1, 0])
    assert not one.surely([1, 0], [1, 0])


def test_divergences_are_per_sample_and_their_mean_does_not_depend_on_the_batching(
    trained: DigitsViT, digit_data: Digits
) -> None:
    one = decision(trained, digit_data, "tome")
    module, images = trial(one.program, one.plan_of(constant(one))), digit_data.train_images[:12]
    whole = divergences(one.program, module, [Batch((images,))])
    parts = divergences(one.program, module, [Batch((images[:5],)), Batch((images[5:],))])
    assert whole.shape == (12,)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-9)
    assert divergence(one.program, module, [Batch((images,))]) == pytest.approx(float(whole.mean()))
    assert float(whole.min()) >= 0


def batched(one: Decision, digits: Digits) -> list[Batch]:
    one.batches[:] = [Batch((part,)) for part in digits.train_images[:96].split(32)]
    return one.batches


def test_the_dense_model_runs_once_per_batch_and_the_plan_is_the_same_where_nothing_fits(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    class Counted(damage.Interpreter):
        def __init__(self, module: Any) -> None:
            super().__init__(module)
            runs.append(id(module))

    monkeypatch.setattr(damage, "Interpreter", Counted)
    for flops in (0.7, 0.6):
        plans, of_dense, of_others = [], [], []
        for most in (2**20, 0):
            one = decision(trained, digit_data, "tome{improve=6,guard=false}", flops)
            batched(one, digit_data)
            one.reference = Reference(one.program, most)
            runs.clear()
            plans.append(one.within(one.limit))
            dense = runs.count(id(one.program.exported.graph_module))
            of_dense.append(dense)
            of_others.append(len(runs) - dense)
        assert plans[0] == plans[1]
        assert of_dense == [3, of_others[1]]
        # schedules that differ and moves, three batches each: how many there are depends on how the weights turned out
        assert of_others[0] == of_others[1] >= 2 * 3


def test_a_reference_keeps_what_fits_and_gives_the_same_for_what_does_not(
    trained: DigitsViT, digit_data: Digits
) -> None:
    one = decision(trained, digit_data, "tome")
    batches = batched(one, digit_data)
    each = 32 * 10 * 4  # logits of a batch, fp32
    for most, kept in ((0, 0), (2 * each, 2), (10 * each, 3)):
        known = Reference(one.program, most)
        first = [known.targets(b)[0].value for b in batches]
        again = [known.targets(b)[0].value for b in batches]
        assert known.used == kept * each
        assert sum(a is b for a, b in zip(first, again, strict=True)) == kept
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with memory.memory_limit("1MiB"):
        assert Reference(one.program).most == 2**20
    assert Reference(one.program).most > 2**20


def test_plain_ranks_and_mean_maps_are_options(trained: DigitsViT, digit_data: Digits) -> None:
    one = decision(trained, digit_data, "tome{schedule=optin,guard=false,aware=false,mean_first=true}")
    plain = eliminate(one.scores("optin"), one.costs, one.limit, one.tokens.method.cap, aware=False)
    assert removed(one) == plain
    other = decision(trained, digit_data, "tome{schedule=optin,guard=false}")
    assert other.scores("optin") != one.scores("optin")
    assert removed(other) == eliminate(other.scores("optin"), other.costs, other.limit, other.tokens.method.cap)
