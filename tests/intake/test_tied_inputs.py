"""Inputs whose values are tied to each other: what is drawn for checks keeps the ties, or says what was not checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.data import generate
from fxprune.intake.capture import capture
from fxprune.intake.load import load
from fxprune.ir.signature import DRAWS, sample_inputs, sizes_to_try
from fxprune.target.parity import check_parity, eager, inputs_that_run

SLOT, END = 49, 2


class Seeing(nn.Module):
    """Image tokens are replaced by the patches of the pictures: there must be as many of them."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.v = nn.Embedding(50, 32), nn.Conv2d(3, 32, 8, 8)
        self.a, self.b = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x, v = self.e(input_ids), self.v(pixel_values).flatten(2).transpose(1, 2)
        x = x.masked_scatter((input_ids == SLOT).unsqueeze(-1).expand_as(x), v)
        return x + self.b(torch.relu(self.a(x)))


class PoolsAtTheEnd(nn.Module):
    """A sentence is what its last END token says: every row needs as many of them."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(50, 32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.e(input_ids)
        x = x + self.b(torch.relu(self.a(x)))
        ends = x[input_ids == END]
        return ends.view(x.shape[0], -1, x.shape[-1])[:, -1]


def seen() -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(3, 48, (2, 12))
    ids[:, 1:5] = SLOT  # four patches a picture
    return Seeing().eval(), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def pooled() -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(3, 50, (2, 12))
    ids[:, -1] = END
    return PoolsAtTheEnd().eval(), {"input_ids": ids}


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
@pytest.mark.parametrize("build", [seen, pooled])
@pytest.mark.parametrize("seed", range(3))
def test_ids_keep_what_ties_them_whatever_the_seed(build: Any, seed: int) -> None:
    model, inputs = build()
    artifact = fxprune.compile(model, inputs, flops=0.7, seed=seed)
    assert artifact.report["masked"]["max_rel"] < 1e-4
    made = fxprune.compile(model, inputs, flops=0.7, seed=seed, importance="taylor")  # on inputs that are made up
    assert made.report["masked"]["max_rel"] < 1e-4


def test_made_up_ids_are_rows_of_the_example_only_where_the_model_needs_it() -> None:
    model, inputs = pooled()
    data = generate(load(model, input=inputs), samples=5, seed=1)
    assert "rows of the example" in data.origin
    rows = {tuple(row) for row in inputs["input_ids"].tolist()}
    assert {tuple(row) for b in data.batches for row in b.kwargs["input_ids"].tolist()} <= rows
    free = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
    assert "rows" not in generate(load(free, input=inputs["input_ids"]), samples=5).origin


def test_one_order_of_rows_for_all_inputs_of_a_batch() -> None:
    class Two(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return ids * mask, other + 1

    ids, other = torch.arange(40).reshape(8, 5), torch.arange(6).reshape(3, 2)
    program = capture(Two(), (ids, ids + 100, other))
    drawn = [sample_inputs(program, seed=seed) for seed in range(3)]
    for a, b, _ in drawn:
        assert torch.equal(a + 100, b), "a mask stays with its ids"
        assert sorted(a.tolist()) == ids.tolist()
    assert any(not torch.equal(a, ids) for a, _, _ in drawn)
    same = sample_inputs(program, seed=1, draw=DRAWS[2])
    assert all(torch.equal(a, b) for a, b in zip(same, (ids, ids + 100, other), strict=True))


def test_a_shorter_row_is_cut_where_the_model_still_runs() -> None:
    model, inputs = pooled()
    program = capture(model, (), inputs)
    shorter = next(s for s in sizes_to_try(program) if 12 not in s.values())
    flat, _ = inputs_that_run(program, eager(program.exported), shorter)
    assert flat[0].shape[1] < 12
    assert bool((flat[0] == END).sum(1).eq(1).all())


def test_sizes_at_which_the_model_itself_fails_are_named_and_left_out() -> None:
    model, inputs = pooled()
    inputs["input_ids"][1] = inputs["input_ids"][1].flip(0)  # one END is last, one first: every cut takes one away
    program = capture(model, (), inputs)
    parity = check_parity(program, eager(program.exported))
    assert parity.ok
    assert parity.tried
    assert any(sizes["sequence"] < 12 and why for sizes, why in parity.skipped)
