"""Floors and multiples, for all groups or for those that a pattern names."""

from __future__ import annotations

import pytest
import torch
from support.digits import tiny_vit

import fxprune
from fxprune import OptionError, PruneGroup
from fxprune.passes.analysis.find_groups import is_named_by
from fxprune.request.limits import per_pattern
from fxprune.request.options import Limits

SHAPE = "2x1x8x8"
MLP, HEADS = "blocks.1.mlp.0:ffn", "blocks.1.attn.qkv:head"


def groups(**limits: object) -> dict[str, PruneGroup]:
    program = fxprune.inspect(tiny_vit().eval(), SHAPE, **limits)  # type: ignore[arg-type]
    return {g.name: g for g in program.need("groups")}


@pytest.mark.parametrize(
    ("given", "plain", "patterns"),
    [
        (None, None, ()),
        (8, 8.0, ()),
        ("8", 8.0, ()),
        ("0.1,*.ffn=0.3", 0.1, ("*.ffn=0.3",)),
        ([0.1, "a=0.2", 0.4], 0.4, ("a=0.2",)),
        ((), None, ()),
        ("blocks.[01].*=0.5", None, ("blocks.[01].*=0.5",)),
    ],
)
def test_numbers_and_patterns_are_told_apart(given: object, plain: float | None, patterns: tuple[str, ...]) -> None:
    assert per_pattern(given, "--floor") == (plain, patterns)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("align", "floor", "message"),
    [
        ("many", 0.1, "align=many"),
        ("*.ffn=x", 0.1, "cannot be read"),
        ("*.ffn=0", 0.1, "at least 1"),
        ("*.ffn=2.5", 0.1, "whole number"),
        (2.5, 0.1, "whole number"),
        (None, "ffn=1.5", "between 0 and 1"),
        (None, -0.1, "between 0 and 1"),
        (None, "=", "cannot be read"),
        (None, "nan", "between 0 and 1"),
    ],
)
def test_what_is_no_limit_is_refused_before_anything_runs(align: object, floor: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Limits(align, floor).find_groups(8)  # type: ignore[arg-type]


def test_a_pattern_changes_the_groups_that_it_names_and_no_other() -> None:
    plain, some = groups(), groups(floor="blocks.1.mlp=0.5", align="blocks.1.mlp=16")
    assert (some[MLP].floor, some[MLP].granularity) == (48, 16)
    for name, group in plain.items():
        if name != MLP:
            assert (some[name].floor, some[name].granularity) == (group.floor, group.granularity)


def test_a_kind_is_a_pattern_and_heads_have_shares_too() -> None:
    found = groups(floor="heads=0.6", align="heads=2")
    assert (found[HEADS].floor, found[HEADS].granularity) == (4, 2), "at least 0.6 of four heads, in pairs"
    assert found[HEADS].levels() == [4]
    assert groups(floor="head=0.5")[HEADS].levels() == [2, 3, 4]


def test_the_last_match_counts() -> None:
    assert groups(floor=["ffn=0.5", "blocks.1.*=0.25"])[MLP].floor == 24
    assert groups(floor=["blocks.1.*=0.25", "ffn=0.5"])[MLP].floor == 48


def test_a_share_is_a_promise_rounded_up() -> None:
    kept = groups(floor="ffn=0.26", align=1)[MLP].floor
    assert kept == 25
    assert kept / 96 >= 0.26


@pytest.mark.parametrize(
    "pattern", [MLP, "blocks.1.mlp.0.ffn", "*.ffn", "blocks.1.mlp", "blocks.*.mlp", "blocks.1", "ffn"]
)
def test_names_of_groups_modules_and_kinds_are_patterns(pattern: str) -> None:
    assert is_named_by(groups()[MLP], pattern)
    assert is_named_by(groups()[HEADS], pattern) == (pattern == "blocks.1")
    assert not is_named_by(groups()["patch:width"], pattern)


@pytest.mark.parametrize("option", ["floor", "align"])
def test_a_pattern_that_names_nothing_that_may_be_cut_is_an_error(option: str) -> None:
    number = {"floor": "0.5", "align": "2"}[option]
    for pattern in ("block.*.mlp", "head"):
        with pytest.raises(OptionError, match="names no group that may be cut") as caught:
            groups(**{option: f"{pattern}={number}", "freeze": ["blocks.*.attn.*"]})
        assert f"{option}={pattern}={number}" in caught.value.where


def test_limits_hold_in_the_result_and_over_rounds() -> None:
    model, data = tiny_vit().eval(), [torch.randn(8, 1, 8, 8)]
    for rounds in (1, 2):
        made = fxprune.compile(
            model,
            data=data,
            flops=0.6,
            importance="fisher",
            recover="none",
            rounds=rounds,
            floor=["blocks.1.mlp=0.75"],
            align=["*.ffn=16"],
        )
        choices = made.plan.choices
        assert all(len(c.keep) % 16 == 0 for c in choices.values() if c.kind == "ffn")
        assert MLP not in choices or len(choices[MLP].keep) >= 72
        assert len(choices["blocks.0.mlp.0:ffn"].keep) < 72
    assert "find-groups{aligns=[*.ffn=16],floors=[blocks.1.mlp=0.75]}" in made.report["pipeline"]
