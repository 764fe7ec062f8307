"""Token pruning against a loop over images, and the laws of a token op."""

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
    assert_counted,
    assert_identity,
    assert_reduces,
    assert_registered,
    assert_sound,
    call,
    layouts,
    most_dropped,
    other_batch,
)
from torch import Tensor

from fxprune.ops.order import places, rank, take
from fxprune.ops.prune import prune_tokens


def pruned_by_hand(x: Tensor, score: Tensor, size: Tensor, r: int, protected: int) -> Results:
    """One image [tokens, width]: drop the lowest score, r times; of equal ones the last."""
    kept = list(range(len(x)))
    for _ in range(r):
        kept.remove(min(kept[protected:], key=lambda t: (float(score[t]), -t)))
    place = torch.tensor([kept.index(t) if t in kept else -1 for t in range(len(x))])
    return x[kept], size[kept], place


@settings(deadline=None, max_examples=drawing.of(15, 60))
@given(layouts(), st.booleans(), st.data())
def test_equals_a_loop_over_images(layout: Layout, ties: bool, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, most_dropped(layout)))
    score = (layout.score * 20).round() if ties else layout.score
    results = call("prune_tokens", layout.x, score, layout.size, r, layout.protected)
    by_hand = [
        pruned_by_hand(x, s, n, r, layout.protected) for x, s, n in zip(layout.x, score, layout.counts, strict=True)
    ]
    assert_reduces(layout, r, results, by_hand)
    if r == 0:
        assert_identity(layout, results)
    for image in range(layout.batch):  # what stays is unchanged, bit for bit, and place says where it is
        stays = results[2][image] >= 0
        assert torch.equal(results[0][image][results[2][image][stays]], layout.x[image][stays])


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_ranks_and_places_are_those_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks = rank(torch.tensor([values, values]))[1].tolist()
    assert [ranks[i] for i in order] == list(range(len(values)))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    positions, place = places(torch.tensor([chosen]), sum(chosen))
    assert positions.tolist() == [[i for i, c in enumerate(chosen) if c]]
    assert place.tolist() == [[sum(chosen[:i]) if c else -1 for i, c in enumerate(chosen)]]
    rows = torch.randn(1, len(values), 2)
    assert torch.equal(take(rows, positions), rows[:, positions[0]])


def test_the_identity_shares_no_memory_with_its_arguments() -> None:
    x, size = torch.randn(2, 6, 3), torch.ones(2, 6, 1)
    same, counts, place = prune_tokens(x, x[:, :, 0], size, 0, 1)
    for result in (same, counts, place):
        result.zero_()
    assert x.abs().min() > 0
    assert size.eq(1).all()


def test_nan_scores_give_nothing_out_of_range() -> None:
    kept, _, _ = prune_tokens(torch.randn(2, 6, 3), torch.full((2, 6), torch.nan), None, 2, 1)
    assert kept.shape == (2, 4, 3)


def test_counts_out_of_range_are_refused() -> None:
    x = torch.randn(1, 9, 4)
    for r, protected in ((9, 0), (8, 1), (-1, 1), (1, 10)):
        with pytest.raises(ValueError, match=r"tokens.*\.$"):
            call("prune_tokens", x, x[:, :, 0], None, r, protected)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_sound(protected: int) -> None:
    x, score, size = torch.randn(2, 20, 6), torch.rand(2, 20), torch.randint(1, 40, (2, 20, 1)).float()
    assert_sound("prune_tokens", (x, score, size), (4, protected))


def test_registered() -> None:
    assert_registered("prune_tokens", (torch.randn(2, 9, 6), torch.rand(2, 9)), (None, 3, 1))


def test_nothing_is_multiplied() -> None:
    tensors = {"x": torch.randn(3, 9, 6), "score": torch.rand(3, 9), "size": None}
    assert assert_counted("prune_tokens", tensors, {"r": 3, "protected": 1}) == 0


def test_deploys_ties_included() -> None:
    size = torch.tensor([1.0, 2]).repeat(10)[None, :, None]
    deployed = Deployed("prune_tokens", (torch.randn(1, 20, 6), torch.rand(1, 20), size), (7, 1))
    deployed.assert_deploys(other_batch)
    x, score, size = torch.randn(7, 20, 6), (3 * torch.rand(7, 20)).round(), torch.ones(7, 20, 1)
    for got, want in zip(deployed.run(x, score, size), prune_tokens(x, score, size, 7, 1), strict=True):
        assert torch.equal(got, want)
