"""Token merging against a loop over images and pairs, and the laws of a token op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import drawing
from support.token_laws import (
    Deployed,
    Layout,
    Results,
    assert_conserves,
    assert_counted,
    assert_identity,
    assert_reduces,
    assert_registered,
    assert_sound,
    call,
    layouts,
    most_merged,
    other_batch,
    some_equal,
    unit,
)
from torch import Tensor

from fxprune.ops.tome import merge_tokens

SIZE = torch.tensor([1.0, 2, 3]).repeat(17)[None, :50, None]


def merged_by_hand(x: Tensor, metric: Tensor, size: Tensor, r: int, protected: int) -> Results:
    """One image [tokens, width]: look at all pairs, merge the r best ones one by one."""
    tokens = len(x)
    a_side = [t for t in range(protected, tokens) if t % 2 == 0]
    b_side = [t for t in range(protected, tokens) if t % 2 == 1]
    pairs = []
    for a in a_side:
        similarity = [float(unit(metric[a]) @ unit(metric[b])) for b in b_side]
        nearest = max(range(len(b_side)), key=lambda j: (similarity[j], -j))
        pairs.append((-similarity[nearest], a, b_side[nearest]))
    gone = {a: b for _, a, b in sorted(pairs)[:r]}
    order = [*range(protected), *(a for a in a_side if a not in gone), *b_side]
    place = torch.tensor([order.index(gone.get(t, t)) for t in range(tokens)])
    members = [(place == i).nonzero().flatten() for i in range(len(order))]
    counts = torch.stack([size[m].sum(0) for m in members])
    return torch.stack([(size[m] * x[m]).sum(0) for m in members]) / counts, counts, place


@settings(deadline=None, max_examples=drawing.of(15, 60))
@given(layouts(), st.data())
def test_equals_a_loop_over_images_and_conserves(layout: Layout, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, most_merged(layout)))
    results = call("merge_tokens", layout.x, layout.metric, layout.size, r, layout.protected)
    by_hand = [
        merged_by_hand(x, m, s, r, layout.protected)
        for x, m, s in zip(layout.x, layout.metric, layout.counts, strict=True)
    ]
    if r == 0:
        assert_identity(layout, results)
    else:  # without merging tokens keep their order, not ToMe's
        assert_reduces(layout, r, results, by_hand)
    assert_conserves(layout, results)


def test_vector_of_the_method() -> None:
    """methods 11.4"""
    metric = torch.tensor([[[1, 0], [0, 1], [0.1, 1], [1, 0.2], [1, 0]]])
    x = torch.tensor([10.0, 20, 30, 40, 50])[None, :, None]
    merged, size, place = merge_tokens(x, metric, None, 1, 1)
    assert merged.flatten().tolist() == [10, 50, 25, 40]
    assert size.flatten().tolist() == [1, 1, 2, 1]
    assert place.tolist() == [[0, 2, 2, 3, 1]]


def test_thirteen_tokens_in_twelve_blocks() -> None:
    """methods 11.4"""
    x, size = torch.randn(1, 197, 8), None
    for _ in range(12):
        x, size, _ = merge_tokens(x, x, size, 13, 1)
    assert x.shape == (1, 41, 8)
    assert size is not None
    assert size.sum() == 197


def test_all_equal_tokens_merge_in_order() -> None:
    x = torch.arange(8.0)[None, :, None]
    _, size, place = merge_tokens(x, torch.ones(1, 8, 4), None, 2, 1)
    assert place.tolist() == [[0, 2, 2, 3, 2, 4, 1, 5]]  # 2 and 4, the first of A, go to 1, the first of B
    assert size.flatten().tolist() == [1, 1, 3, 1, 1, 1]


def test_zero_keys_are_like_nothing() -> None:
    merged = merge_tokens(torch.randn(2, 9, 4), torch.zeros(2, 9, 4), None, 3, 1)
    assert all(result.isfinite().all() for result in merged)


def test_counts_out_of_range_are_refused() -> None:
    x = torch.randn(1, 9, 4)
    for r, protected in ((5, 0), (-1, 1), (1, 10), (4, 2), (1, -1)):
        with pytest.raises(ValueError, match=r"tokens.*\.$"):
            call("merge_tokens", x, x, None, r, protected)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_sound(protected: int) -> None:
    x, metric, size = torch.randn(2, 20, 6), torch.randn(2, 20, 5), torch.randint(1, 40, (2, 20, 1)).float()
    assert_sound("merge_tokens", (x, metric, size), (4, protected))


def test_registered() -> None:
    assert_registered("merge_tokens", (torch.randn(2, 9, 6), torch.randn(2, 9, 4)), (None, 3, 1))


@pytest.mark.parametrize(("tokens", "r", "protected"), [(9, 0, 1), (9, 3, 1), (10, 5, 0), (17, 4, 2), (16, 3, 5)])
def test_macs_are_those_counted(tokens: int, r: int, protected: int) -> None:
    tensors = {"x": torch.randn(3, tokens, 6), "metric": torch.randn(3, tokens, 5), "size": None}
    assert (assert_counted("merge_tokens", tensors, {"r": r, "protected": protected}) > 0) == (r > 0)


def test_deploys_ties_included() -> None:
    deployed = Deployed("merge_tokens", (torch.randn(1, 50, 6), torch.randn(1, 50, 64), SIZE), (11, 1))
    deployed.assert_deploys(other_batch)
    for kinds in (1, 3, 20):
        x, metric = torch.randn(7, 50, 6), some_equal(7, 50, 64, kinds, seed=kinds)
        size = SIZE.repeat(7, 1, 1)
        wanted = merge_tokens(x, metric, size, 11, 1)
        for got, want in zip(deployed.run(x, metric, size), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        alone = torch.cat([merge_tokens(x[i : i + 1], metric[i : i + 1], None, 11, 1)[2] for i in range(7)])
        assert torch.equal(alone, wanted[2])


def test_deploys_where_all_of_one_side_merges() -> None:
    Deployed("merge_tokens", (torch.randn(1, 9, 6), torch.randn(1, 9, 4)), (None, 4, 1)).assert_deploys(other_batch)
