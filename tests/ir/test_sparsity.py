"""Sparsity and the plan that holds it: through JSON and back, ragged borders, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fxprune.errors import OptionError, PlanError
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.sparsity import Sparsity, grid, spread, tile_areas, tile_of, tile_sums, two_of_four


def test_density_and_mask_count_what_ragged_tiles_hold() -> None:
    kept = torch.tensor([[True, False], [False, True]])
    one = Sparsity("4x8", (6, 11), kept)
    assert one.mask().shape == (6, 11)
    assert int(one.mask().sum()) == 4 * 8 + 2 * 3
    assert one.density == pytest.approx(38 / 66)
    assert tile_areas((6, 11), (4, 8)).tolist() == [[32, 12], [16, 6]]
    matrix = torch.randn(2, 6, 11)
    sums = tile_sums(matrix, (4, 8))
    torch.testing.assert_close(sums[1, 1, 1], matrix[1, 4:, 8:].sum())
    assert torch.equal(tile_sums(spread(kept.int(), (6, 11), (4, 8)), (4, 8)), kept * tile_areas((6, 11), (4, 8)))


@pytest.mark.parametrize("pattern", ["32x16", "2:4"])
def test_a_plan_with_blocks_survives_json(pattern: str) -> None:
    shape = (70, 45)
    kept = torch.rand(*grid(shape, tile_of(pattern))) < 0.5
    order = tuple(range(44, -1, -1)) if pattern == "2:4" else ()
    tiles = {"w": Sparsity(pattern, shape, kept, order)}
    plan = CompressionPlan({"a": Choice("ffn", 4, (1, 2))}, {"seed": 1}).with_blocks(tiles)
    assert not plan.empty
    assert not CompressionPlan().with_blocks(plan.blocks).empty
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.blocks["w"].kept.tolist() == kept.tolist()
    assert CompressionPlan.from_json(again.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "needs pattern"),
        ({"pattern": "32x32", "shape": [4], "keep": []}, "two positive integers"),
        ({"pattern": "wide", "shape": [4, 4], "keep": []}, "is no tile"),
        ({"pattern": "0x4", "shape": [4, 4], "keep": []}, "is no tile"),
        ({"pattern": "2x2", "shape": [4, 4], "keep": [0, 9]}, "out of range"),
        ({"pattern": "2x2", "shape": [4, 4], "keep": [1, 1]}, "sorted and unique"),
        ({"pattern": "2x2", "shape": [4, 4], "keep": [True]}, "list of integers"),
        ({"pattern": "2:4", "shape": [4, 4], "keep": [1]}, "base64"),
        ({"pattern": "2:4", "shape": [4, 4], "keep": "AA=="}, "bits"),
        ({"pattern": "2x2", "shape": [4, 4], "keep": [0], "order": [0, 1, 2, 2]}, "each of 4 inputs once"),
        ({"pattern": "2x2", "shape": [4, 4], "keep": [0], "order": "no"}, "order must be"),
    ],
)
def test_malformed_blocks_are_refused_at_their_name(entry: Any, message: str) -> None:
    first = {"fxprune_plan": 1, "groups": {}, "blocks": {"fc.weight": entry}}
    now = {"fxprune_plan": 2, "choices": {"fc.weight:block": {"kind": "block", **entry}}} if entry else first
    for plan in (first, now):
        with pytest.raises(PlanError, match=message) as error:
            CompressionPlan.from_json(json.dumps(plan))
        assert "fc.weight" in error.value.where


def test_tiles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match="do not fit"):
        Sparsity("4x4", (8, 8), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="outputs x inputs"):
        tile_of("32")


def test_two_of_every_four_stay_and_the_larger_ones() -> None:
    values = torch.randn(5, 13).abs()
    kept = two_of_four(values)
    fours = kept[:, :12].view(5, 3, 4)
    assert fours.sum(-1).eq(2).all()
    for i in range(5):
        for j in range(3):
            four = values[i, 4 * j : 4 * j + 4]
            assert four[fours[i, j]].min() >= four[~fours[i, j]].max()
    assert kept[:, 12].all()
    assert two_of_four(torch.zeros(1, 4)).tolist() == [[True, True, False, False]]
