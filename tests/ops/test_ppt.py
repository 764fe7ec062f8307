"""Pruning or merging by image: the right branch, DeiT-S's token counts, and the laws of a token op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import drawing
from support.token_laws import (
    Deployed,
    Layout,
    assert_counted,
    assert_identity,
    assert_registered,
    assert_sound,
    call,
    layouts,
    most_merged,
    other_batch,
)

from fxprune.ops.ppt import adapt_tokens
from fxprune.ops.prune import prune_tokens
from fxprune.ops.tome import merge_tokens


@settings(deadline=None, max_examples=drawing.of(15, 60))
@given(layouts(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e30]), st.data())
def test_each_image_takes_its_own_branch(layout: Layout, threshold: float, data: st.DataObject) -> None:
    r, p = data.draw(st.integers(0, most_merged(layout))), layout.protected
    results = call("adapt_tokens", layout.x, layout.metric, layout.score, layout.size, r, p, threshold)
    if r == 0:
        return assert_identity(layout, results)
    for i in range(layout.batch):
        image = slice(i, i + 1)
        x, counts = layout.x[image], layout.counts[image]
        scores = layout.score[i, p:]
        if scores.var() / scores.mean() ** 2 >= threshold:
            alone = prune_tokens(x, layout.score[image], counts, r, p)
        else:
            alone = merge_tokens(x, layout.metric[image], counts, r, p)
        for got, want in zip(results, alone, strict=True):
            torch.testing.assert_close(got[i], want[0])
        assert (results[2][i] < 0).any() == (scores.var() / scores.mean() ** 2 >= threshold)


def test_limits() -> None:
    x, metric, score = torch.randn(5, 12, 4), torch.randn(5, 12, 4), torch.rand(5, 12)
    same, zero = torch.full((5, 12), 1 / 11), torch.zeros(5, 12)
    pruned, merged = prune_tokens(x, score, None, 4, 1), merge_tokens(x, metric, None, 4, 1)
    for got, want in zip(adapt_tokens(x, metric, score, None, 4, 1, 0.0), pruned, strict=True):
        assert torch.equal(got, want)
    for scores, threshold in ((score, 1e30), (score, float("inf")), (same, 1e-6)):
        for got, want in zip(adapt_tokens(x, metric, scores, None, 4, 1, threshold), merged, strict=True):
            assert torch.equal(got, want)
    assert adapt_tokens(x, metric, zero, None, 4, 1, 1e-6)[0].isfinite().all()
    assert (adapt_tokens(x, metric, zero + 0.125, None, 4, 1, 0.0)[2] < 0).any(-1).all()  # no variance reaches 0 too


def test_token_counts_of_deit_small() -> None:
    x, counts = torch.randn(1, 197, 8), []
    for block in range(12):
        if block in (3, 6, 9):
            r = min(50, (x.shape[1] - 1) // 2)
            x, _, _ = adapt_tokens(x, x, torch.rand(x.shape[:2]), None, r, 1, 0.3)
        counts.append(x.shape[1])
    assert counts == [197] * 3 + [147] * 3 + [97] * 3 + [49] * 3


def test_counts_out_of_range_are_refused() -> None:
    x = torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match=r"removes 0 to 4, not 5"):
        call("adapt_tokens", x, x, x[:, :, 0], None, 5, 1, 1.0)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("threshold", [0.0, 1e30])
def test_sound(protected: int, threshold: float) -> None:
    x, metric, score = torch.randn(2, 20, 6), torch.randn(2, 20, 5), torch.rand(2, 20)
    size = torch.randint(1, 40, (2, 20, 1)).float()
    assert_sound("adapt_tokens", (x, metric, score, size), (4, protected, threshold))


def test_registered() -> None:
    tensors = (torch.randn(2, 9, 6), torch.randn(2, 9, 4), torch.rand(2, 9))
    assert_registered("adapt_tokens", tensors, (None, 3, 1, 0.3), traced=False)  # both of its parts are


def test_macs_are_those_of_merging() -> None:
    tensors = {"x": torch.randn(3, 10, 6), "metric": torch.randn(3, 10, 5), "score": torch.rand(3, 10), "size": None}
    assert assert_counted("adapt_tokens", tensors, {"r": 3, "protected": 1, "threshold": 1.0}) == 4 * 5 * 5 + 5 * 3 * 6
    assert assert_counted("adapt_tokens", tensors, {"r": 0, "protected": 1, "threshold": 1.0}) == 0


def test_deploys() -> None:
    size = torch.tensor([1.0, 2]).repeat(10)[None, :, None]
    tensors = (torch.randn(1, 20, 6), torch.randn(1, 20, 8), torch.rand(1, 20).softmax(-1), size)
    deployed = Deployed("adapt_tokens", tensors, (7, 1, 1.5))
    deployed.assert_deploys(other_batch)
    branches = (call("adapt_tokens", *(other_batch(t, 7) for t in tensors), 7, 1, 1.5)[2] < 0).any(-1)
    assert branches.any()
    assert not branches.all()
