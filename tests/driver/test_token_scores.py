"""OPTIN's token importance: curves and removals, on tokens that matter and tokens that do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.token_models import TokenViT, analysed, scrambled
from torch import nn

from fxprune.data.batch import Batch
from fxprune.driver.token_scores import TokenScores, _Watch, even, increments
from fxprune.ir.plan import TokenPlan
from fxprune.passes.transform.merge_tokens import trial
from fxprune.passes.transform.reducers.one import One
from fxprune.passes.transform.reducers.tome import Tome


def scores_of(model: nn.Module, images: torch.Tensor) -> TokenScores:
    return TokenScores(analysed(model), [Batch((images,), {})], trial)


def test_increments_are_a_convex_curve_through_the_points() -> None:
    found = increments([2, 4], [2.0, 6.0], 5)
    assert sum(found[:2]) == pytest.approx(2.0)
    assert sum(found[:4]) == pytest.approx(6.0)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    # a dent is taken out, what falls stays level
    assert increments([1, 2, 3], [3.0, 3.0, 6.0], 3) == pytest.approx([1.5, 1.5, 3.0])
    assert increments([4], [0.0], 6) == [0.0] * 6


def test_positions_are_even() -> None:
    assert even(16, 4) == [2, 6, 10, 14]
    assert even(3, 9) == [0, 1, 2]


def test_merging_what_is_the_same_costs_nothing() -> None:
    model = scrambled(TokenViT())
    with torch.no_grad():
        model.position.zero_()  # type: ignore[union-attr, operator]
    plain = torch.randn(4, 3, 1, 1).expand(4, 3, 32, 32)
    same, other = scores_of(model, plain), scores_of(model, torch.randn(4, 3, 32, 32))
    site = same.sites[0]
    assert max(same.loss(site, Tome(), 6)) < 1e-6
    assert min(other.loss(site, Tome(), 6)) > 1e-4


def test_more_removed_is_more_lost_and_every_token_has_a_score() -> None:
    found = scores_of(scrambled(TokenViT()), torch.randn(4, 3, 32, 32))
    curves = found.curves(Tome())
    assert [len(c) for c in curves] == [16] * 3
    assert all(a <= b + 1e-9 for c in curves for a, b in itertools.pairwise(c))
    removals = found.removals(4)
    assert [len(r) for r in removals] == [16] * 3
    assert [len(set(r)) for r in removals] == [4, 4, 1]  # the others have the score of the nearest one
    assert min(v for r in removals[:2] for v in r) > 0
    assert max(removals[2]) < 1e-9  # behind the last attention a token that goes moves no other


def test_a_token_that_nobody_reads_is_worth_nothing() -> None:
    """The last attention is behind the last value that the class token reads: its features alone move."""
    found = scores_of(scrambled(TokenViT(depth=2)), torch.randn(4, 3, 32, 32))
    features, output = found.loss(found.sites[-1], Tome(), 3)
    assert output == pytest.approx(0.0, abs=1e-9)  # the class token is untouched, and nothing reads the others
    assert features > 0


def test_maps_averaged_first_lose_what_differs_between_tokens() -> None:
    """Against the definition, for one token removed at the first of three sites."""
    program, images = analysed(scrambled(TokenViT())), torch.randn(4, 3, 32, 32)
    found = {first: TokenScores(program, [Batch((images,))], trial, first) for first in (False, True)}
    site, one = found[True].sites[0], One(5)
    at = {t.value for t in found[True].taps[site.name]}
    dense = found[True].dense[0].features
    small = _Watch(trial(program, TokenPlan(str(one), {site.name: 1}), one), at)
    small.run(*program.arguments([images]))
    rest = [t for t in range(17) if t != 5 + site.protected]
    losses = {False: 0.0, True: 0.0}
    for name in at:
        now, was = (torch.nn.functional.normalize(x, dim=-1) for x in (small.kept[name], dense[name][:, rest]))
        maps = [torch.stack([x[:, t] @ x[:, t].T for t in range(16)]) for x in (now, was)]
        losses[False] += float((maps[0] - maps[1]).square().sum((1, 2)).mean() / 16)
        losses[True] += float((maps[0].mean(0) - maps[1].mean(0)).square().sum() / 16)
    for first, want in losses.items():  # in fp32: maps whose entries are near one differ by 1e-4
        assert found[first].loss(site, one, 1)[0] == pytest.approx(want, rel=2e-2)
    assert losses[True] < losses[False]
