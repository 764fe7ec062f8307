"""How many samples a run takes where nobody says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.driver import samples
from fxprune.driver.samples import LEAST, MOST, choose_amount
from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.flops import count_macs


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize("batch", [2, 5])
def test_a_sample_costs_the_same_whatever_the_example_holds(batch: int) -> None:
    assert count_macs(capture(perceptron(), (torch.randn(batch, 16),), {})) == 16 * 64 + 64 * 8


@pytest.mark.parametrize(
    ("macs", "wanted"), [(1, MOST), (samples.EFFORT / MOST, MOST), (samples.EFFORT / 500, 500), (samples.EFFORT, LEAST)]
)
def test_the_more_a_sample_costs_the_fewer_are_taken(macs: float, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "count_macs", lambda _: macs)
    found = choose_amount("auto", capture(perceptron(), (torch.randn(2, 16),), {}))
    assert found.samples == wanted
    assert str(wanted) in found.why


def test_what_was_asked_for_is_taken_and_needs_no_reason() -> None:
    found = choose_amount(7, capture(perceptron(), (torch.randn(2, 16),), {}))
    assert (found.samples, found.why) == (7, "")


def test_the_report_says_how_many_and_why() -> None:
    small = fxprune.compile(perceptron(), torch.randn(2, 16), flops=0.6, data=torch.randn(MOST + 200, 16))
    assert small.report["data"]["samples"] == MOST
    assert f"at most {MOST}" in small.report["data"]["amount"]


def test_another_word_is_an_error_before_anything_runs() -> None:
    with pytest.raises(OptionError, match="a whole number, or auto"):
        fxprune.compile(perceptron(), torch.randn(2, 16), flops=0.6, data=torch.randn(8, 16), samples="many")
