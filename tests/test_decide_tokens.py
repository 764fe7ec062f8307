"""How many tokens go where: what the guard keeps, and what it believes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Digits

from fxprune.cost import Budget
from fxprune.data import Batch
from fxprune.decide_tokens import Decision
from fxprune.demo import DigitsViT
from fxprune.group import Kind
from fxprune.passes.analysis.importance.damage import divergence, divergences
from fxprune.passes.search.token_schedule import profile
from fxprune.passes.transform.merge_tokens import trial
from fxprune.token_wish import TokenWish
from fxprune.work import Limits, Wish, Work


def decision(model: DigitsViT, digits: Digits, text: str, flops: float = 0.8) -> Decision:
    work, wish = Work("eager", None, 0, lambda _: None, Limits()), TokenWish(text)
    work.open(model, digits.test_images[:2], None, False, None, 0)
    asked = Wish(Budget("flops", flops), "l2", (Kind.TOKEN,), 1, tokens=wish)
    return Decision(work, asked, wish, work.groups(tokens=True), [Batch((digits.train_images[:64],))])


def constant(one: Decision) -> list[int]:
    return profile([1.0] * len(one.flow.usable), one.costs, one.limit, one.tokens.made.cap)


def removed(one: Decision) -> list[int]:
    plan = one.within(one.limit)
    return [plan.removed.get(s.name, 0) for s in one.flow.usable]


def test_a_schedule_takes_the_constant_ones_place_only_where_it_is_clearly_better(
        trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    free = decision(trained, digit_data, "tome{schedule=optin,guard=false}")
    raw, same = removed(free), constant(free)
    assert raw != same
    found: dict[tuple[int, ...], torch.Tensor] = {}
    monkeypatch.setattr(Decision, "damages", lambda self, r: found[tuple(r)])
    noise = torch.linspace(-1, 1, 64).double()
    for better, kept in ((1.0, raw), (0.05, same), (-1.0, same)):
        found.update({tuple(same): 2 + 0 * noise, tuple(raw): 2 - better + noise})
        assert removed(decision(trained, digit_data, "tome{schedule=optin}")) == kept


def test_the_schedule_is_never_farther_from_dense_than_the_constant_one(trained: DigitsViT,
                                                                       digit_data: Digits) -> None:
    for schedule in ("optin", "removal", "auto"):
        one = decision(trained, digit_data, f"tome{{schedule={schedule},improve=2}}", 0.7)
        assert one.damage(removed(one)) <= one.damage(constant(one))


def test_few_samples_decide_by_the_mean_alone(trained: DigitsViT, digit_data: Digits,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    one: Any = decision(trained, digit_data, "tome")
    monkeypatch.setattr(Decision, "damages", lambda self, r: torch.tensor([float(r[0])]))
    assert one.surely([0, 0], [1, 0])
    assert not one.surely([1, 0], [1, 0])


def test_divergences_are_per_sample_and_their_mean_does_not_depend_on_the_batching(trained: DigitsViT,
                                                                                 digit_data: Digits) -> None:
    one = decision(trained, digit_data, "tome")
    module, images = trial(one.program, one.plan_of(constant(one))), digit_data.train_images[:12]
    whole = divergences(one.program, module, [Batch((images,))])
    parts = divergences(one.program, module, [Batch((images[:5],)), Batch((images[5:],))])
    assert whole.shape == (12,)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-9)
    assert divergence(one.program, module, [Batch((images,))]) == pytest.approx(float(whole.mean()))
    assert float(whole.min()) >= 0
