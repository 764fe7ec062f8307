"""PageRank of tokens on vectors, the three stages against loops over images, and the laws of a token op."""

from __future__ import annotations

import math

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
    unit,
)
from torch import Tensor

from fxprune.ops.zero_tprune import pagerank, pagerank_tokens


def ranked_by_hand(
    attention: Tensor, kept: list[int], protected: int, iterations: int, lowest: float = 0.0, highest: float = 0.0
) -> dict[int, float]:
    """Importance of the ``kept`` tokens of one image, on the matrix cut down to them. attention [heads, T, T]"""
    weight = attention[:, kept][:, :, kept]
    weight = weight / weight.sum(-1, keepdim=True)
    score = torch.ones(len(attention), len(kept), dtype=attention.dtype)
    if protected:
        score[:, 0] = math.sqrt(len(kept))
    score = score / score.sum(-1, keepdim=True)
    for _ in range(iterations):
        score = torch.einsum("hq,hqk->hk", score, weight)
    if highest:
        variance = (score * len(kept)).var(1, correction=0)
        counts = (variance >= lowest) & (variance <= highest)
        score = score[counts] if counts.any() else score
    importance = score.square().mean(0).sqrt() * 4096 * attention.shape[-1]
    return dict(zip(kept, importance.round().tolist(), strict=True))


def pruned_by_hand(
    x: Tensor,
    attention: Tensor,
    metric: Tensor,
    size: Tensor,
    r: int,
    similar: int,
    protected: int,
    iterations: int,
    lowest: float = 0.0,
    highest: float = 0.0,
) -> Results:
    """One image, stage by stage."""
    kept = list(range(len(x)))
    if similar:
        importance = ranked_by_hand(attention, kept, protected, 1, lowest, highest)
        ranked = sorted(kept[protected:], key=lambda t: (-importance[t], t))
        cut = len(ranked) - len(ranked) // 2
        more, less = ranked[:cut], ranked[cut:]
        likeness = {a: max(float(unit(metric[a]) @ unit(metric[b])) for b in more) for a in less}
        for a in sorted(less, key=lambda t: (-likeness[t], t))[:similar]:
            kept.remove(a)
    importance = ranked_by_hand(attention, kept, protected, iterations, lowest, highest)
    for t in sorted(kept[protected:], key=lambda t: (importance[t], -t))[: r - similar]:
        kept.remove(t)
    place = torch.tensor([kept.index(t) if t in kept else -1 for t in range(len(x))])
    return x[kept], size[kept], place


@settings(deadline=None, max_examples=drawing.of(15, 60))
@given(layouts(), st.integers(1, 4), st.sampled_from([(0.0, 0.0), (0.0, 0.4), (0.1, 0.7), (5.0, 5.0)]), st.data())
def test_equals_the_stages_by_image(
    layout: Layout, iterations: int, varying: tuple[float, float], data: st.DataObject
) -> None:
    r, p = data.draw(st.integers(0, most_dropped(layout))), layout.protected
    similar = data.draw(st.integers(0, min(r, (layout.tokens - p) // 2)))
    others = (r, similar, p, iterations, *varying)
    results = call("pagerank_tokens", layout.x, layout.attention, layout.metric, layout.size, *others)
    images = zip(layout.x, layout.attention, layout.metric, layout.counts, strict=True)
    assert_reduces(layout, r, results, [pruned_by_hand(*image, *others) for image in images])
    if r == 0:
        assert_identity(layout, results)


def test_vector_of_the_method() -> None:
    """methods 11.9"""
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])[None, None]
    stationary = torch.tensor([[[0.4, 4 / 15, 1 / 3]]])
    torch.testing.assert_close(pagerank(attention, 50), stationary)
    torch.testing.assert_close(pagerank(attention, 50, emphasis=2.0), stationary)


def test_votes_keep_their_sum_and_doubly_stochastic_attention_ranks_all_the_same() -> None:
    attention = torch.randn(2, 3, 8, 8).softmax(-1)
    torch.testing.assert_close(pagerank(attention, 7).sum(-1), torch.ones(2, 3))
    present = torch.tensor([[True] * 5 + [False] * 3, [False] + [True] * 7])
    left = pagerank(attention, 7, present)
    torch.testing.assert_close(left.sum(-1), torch.ones(2, 3))
    assert torch.equal(left > 0, present[:, None].expand(2, 3, 8))
    turned = torch.stack([torch.eye(50)[torch.randperm(50)] for _ in range(50)])
    doubly = (turned * torch.rand(50).softmax(0)[:, None, None]).sum(0)[None, None]
    torch.testing.assert_close(pagerank(doubly, 9), torch.full((1, 1, 50), 1 / 50))
    _, _, place = pagerank_tokens(torch.randn(1, 50, 2), doubly, torch.randn(1, 50, 2), None, 30, 0, 0, 9)
    assert place.tolist() == [[*range(20), *[-1] * 30]]  # ties, that rounding errors must not break


def test_similar_tokens_go_first_and_the_more_important_one_stays() -> None:
    attention = torch.tensor([0.1, 0.5, 0.1, 0.3]).expand(1, 1, 4, 4)
    metric = torch.tensor([[[1.0, 0], [0, 1], [0, 1], [-1, 0]]])
    _, _, place = pagerank_tokens(torch.randn(1, 4, 2), attention, metric, None, 1, 1, 0, 5)
    assert place.tolist() == [[0, 1, -1, 2]]


def test_the_class_token_starts_at_the_root_of_the_tokens_left() -> None:
    others = [0.3, 0, 0.35, 0.35, 0]
    attention = torch.tensor([[0.2, 0.5, 0, 0.3, 0], others, others, others, others])[None, None]
    metric = torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [1, 0], [1, 0]]])
    _, _, place = pagerank_tokens(torch.randn(1, 5, 2), attention, metric, None, 2, 1, 1, 1)
    # S: 4 goes, like 3. I, of four tokens: 1 gets 2 * 0.5, 2 gets 3 * 0.35; a start of sqrt(5) would give 1 more.
    assert place.tolist() == [[0, -1, 1, 2, -1]]


def test_heads_whose_votes_vary_too_little_or_too_much_do_not_count() -> None:
    flat, sharp = torch.full((4, 4), 0.25), torch.tensor([0.85, 0.05, 0.05, 0.05]).expand(4, 4)
    mild = torch.tensor([0.1, 0.3, 0.2, 0.4]).expand(4, 4)
    attention = torch.stack([flat, sharp, mild])[None]  # variances 0, 1.92 and 0.2
    x, metric = torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    kept = {
        limits: pagerank_tokens(x, attention, metric, None, 2, 0, 0, 1, *limits)[2].tolist()[0]
        for limits in ((0.0, 0.0), (0.1, 0.7), (0.1, 3.0), (0.5, 0.6))
    }
    assert kept[0.1, 0.7] == [-1, 0, -1, 1], "the mild head alone"
    assert kept[0.1, 3.0] == kept[0.0, 0.0] == kept[0.5, 0.6] == [0, -1, -1, 1], "where none is left all count"


def test_a_row_that_looked_only_at_removed_tokens_is_harmless() -> None:
    attention = torch.eye(6).roll(1, 1).expand(2, 2, 6, 6)
    kept, _, _ = pagerank_tokens(torch.randn(2, 6, 3), attention, torch.randn(2, 6, 4), None, 3, 2, 1, 5)
    assert kept.isfinite().all()


def test_arguments_out_of_range_are_refused() -> None:
    x, attention = torch.randn(1, 9, 4), torch.rand(1, 2, 9, 9)
    for others, sentence in (
        ((8, 0, 1, 1), "removes 0 to 7, not 8"),
        ((6, 5, 1, 1), "0 to 4 can go for their similarity, not 5"),
        ((2, 3, 1, 1), "0 to 2 can go for their similarity, not 3"),
        ((2, 1, 1, 0), "at least one iteration"),
        ((2, 1, 1, 3, 0.5, 0.4), "between 0 and a highest value, not 0.5, 0.4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call("pagerank_tokens", x, attention, x, None, *others)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_sound(protected: int) -> None:
    x, metric, size = torch.randn(2, 20, 6), torch.randn(2, 20, 5), torch.randint(1, 40, (2, 20, 1)).float()
    attention = (3 * torch.randn(2, 3, 20, 20)).softmax(-1)
    assert_sound("pagerank_tokens", (x, attention, metric, size), (6, 2, protected, 3))
    assert_sound("pagerank_tokens", (x, attention, metric, size), (6, 2, protected, 3, 0.1, 0.7))


def test_registered() -> None:
    tensors = (torch.randn(2, 9, 6), torch.rand(2, 2, 9, 9), torch.randn(2, 9, 4))
    assert_registered("pagerank_tokens", tensors, (None, 4, 2, 1, 2))


@pytest.mark.parametrize(("r", "similar", "protected"), [(0, 0, 1), (4, 0, 1), (4, 2, 0), (3, 3, 2)])
def test_macs_are_those_counted(r: int, similar: int, protected: int) -> None:
    x, metric = torch.randn(3, 11, 6), torch.randn(3, 11, 5)
    tensors = {"x": x, "attention": torch.rand(3, 2, 11, 11), "metric": metric, "size": None}
    others = {"r": r, "similar": similar, "protected": protected, "iterations": 4}
    assert (assert_counted("pagerank_tokens", tensors, others) > 0) == (r > 0)


def test_deploys_equal_tokens_included() -> None:
    size = torch.tensor([1.0, 2]).repeat(10)[None, :, None]
    attention = torch.randn(1, 2, 20, 20).softmax(-1)
    tensors = (torch.randn(1, 20, 6), attention, torch.randn(1, 20, 8), size)
    Deployed("pagerank_tokens", tensors, (7, 3, 1, 3, 0.01, 0.7)).assert_deploys(other_batch)
    deployed = Deployed("pagerank_tokens", tensors, (7, 3, 1, 3))
    deployed.assert_deploys(other_batch)
    x, same = torch.randn(7, 20, 6), torch.ones(7, 20, 8)
    tied = (x, torch.full((7, 2, 20, 20), 1 / 20), same, torch.ones(7, 20, 1))
    for got, want in zip(deployed.run(*tied), pagerank_tokens(*tied, 7, 3, 1, 3), strict=True):
        torch.testing.assert_close(got, want)
