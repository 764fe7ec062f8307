"""A result that lost the dense model's answers says so, with what would keep them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.driver import survival
from fxprune.process.events import Event
from fxprune.report.headline import CROSS_FITTED, HELD_OUT, SEEN, Headline, headline


def compiled(
    model: DigitsViT, data: Digits, flops: float, samples: int, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "warning":
            told.append(event.text)

    images = data.train_images[: options.pop("count", 400)]
    made = fxprune.compile(
        model,
        images[:2],
        flops=flops,
        data=list(images.split(50)),
        samples=samples,
        seconds=0,
        on_event=listen,
        **options,
    )
    return made.report, told


def test_lost_answers_are_a_warning_with_budgets_that_keep_them(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survival, "LOST", 0.9)  # what is lost on digits is little
    report, told = compiled(trained, digit_data, 0.22, 128, importance="random", recover="none")
    (said,) = [text for text in told if "has lost the dense model's answers" in text]
    first = headline(report)
    assert first is not None
    assert first.value < 0.9
    assert str(first) in said
    assert f"{first.samples} held-out samples" in said
    kept = {int(share): float(flops) for flops, share in re.findall(r"flops=([\d.]+) keeps (\d+) %", said)}
    assert 0.22 < kept[90] <= kept[99] <= 1
    assert 'recover="auto"' in said
    assert said in report["notes"]


def test_what_keeps_its_answers_is_not_warned_of(trained: DigitsViT, digit_data: Digits) -> None:
    _, told = compiled(trained, digit_data, 0.9, 128)
    assert not any("lost" in text for text in told)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("count", "samples", "options", "on", "judged"),
    [
        (400, 128, {}, HELD_OUT, 64),  # the data holds others
        (300, 300, {}, HELD_OUT, 50),  # a fifth of many is held back
        (100, 100, {}, CROSS_FITTED, 50),  # few: fits are judged by samples that they did not see
        (300, 300, {"held_out": 0.0, "recover": "ridge"}, SEEN, 64),
    ],
)
def test_the_first_figure_says_on_what_it_was_measured(
    count: int, samples: int, options: dict[str, Any], on: str, judged: int, trained: DigitsViT, digit_data: Digits
) -> None:
    report, _ = compiled(trained, digit_data, 0.7, samples, importance="l2", count=count, **options)
    first = headline(report)
    assert first is not None
    assert (first.on, first.samples, first.measure) == (on, judged, "top1")
    assert report["agreement"]["held_out"] == (on == HELD_OUT)
    assert 0 <= first.value <= 1


def test_the_error_of_a_share_is_what_draws_of_it_spread_by() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(2000, 64, generator=generator) < 0.8).double().mean(1)
    first = Headline("top1", 1.0, 0.8, 64, HELD_OUT)
    assert first.error == pytest.approx(float(draws.std()), rel=0.1)
    never = Headline("top1", 1.0, 0.0, 64, HELD_OUT).error
    assert never is not None
    assert never > 0.01  # none of 64 is not sure to be none
    assert Headline("cosine", 1.0, 0.9, 64, SEEN).error is None
