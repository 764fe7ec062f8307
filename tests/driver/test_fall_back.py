"""A criterion that says nothing about a model gives way to one that does, with a warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Returns(nn.Module):
    """Positions first, samples second [7, n, 16]; what it returns is named by ``what``."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.b, self.head, self.what = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 3), what

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(torch.relu(self.a(x)))
        if self.what == "a loss":
            return self.head(x).square().mean()
        pooled = self.head(x.mean(0))  # [n, 3], while the first dimension of the input is 7
        return pooled.argmax(-1) if self.what == "a class" else pooled


def batch() -> Tensor:
    return torch.randn(7, 4, 16)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("importance", [None, "taylor", "obs", "fisher"])
@pytest.mark.parametrize("what", ["a loss", "a class", "samples second"])
def test_without_an_output_to_differentiate_activations_decide(what: str, importance: str | None) -> None:
    data, told = [batch() for _ in range(3)], list[Any]()
    artifact = fxprune.compile(
        Returns(what).eval(), batch(), flops=0.7, data=data, importance=importance, on_event=told.append
    )
    warnings = [event.text for event in told if event.kind == "warning"]
    assert any(f"'{importance or 'trajectory'}' cannot score this model" in w and "'activation'" in w for w in warnings)
    assert artifact.plan.about["importance"] == "activation"
    assert artifact.report["cost"]["compressed"]["flops"] <= 0.7 * artifact.report["cost"]["dense"]["flops"]
    assert "score-groups{criterion=activation}" in artifact.report["pipeline"], "the report replays what was done"


def test_made_up_data_gives_way_to_weights_and_rounds_keep_what_was_found() -> None:
    told = list[Any]()
    artifact = fxprune.compile(Returns("a class").eval(), batch(), flops=0.6, importance="taylor", on_event=told.append)
    assert artifact.plan.about["importance"] == "l2"
    assert any("scored by 'l2'" in event.text for event in told)
    told.clear()
    again = fxprune.compile(
        Returns("a class").eval(),
        batch(),
        flops=0.6,
        data=[batch()],
        rounds=2,
        head_scale="auto",
        members="obs",
        on_event=told.append,
    )
    assert again.plan.about["importance"] == "activation"
    assert sum("cannot score" in event.text for event in told) == 1
