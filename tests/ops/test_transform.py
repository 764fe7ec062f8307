"""Many-to-many transforming against loops over tokens and representatives, and the laws of a token op."""

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
    most_dropped,
    other_batch,
    some_equal,
)
from torch import Tensor

from fxprune.ops.transform import transform_tokens


def transformed_by_hand(
    x: Tensor, metric: Tensor, score: Tensor, size: Tensor, r: int, protected: int, temperature: float
) -> Results:
    """One image [tokens, width]: every token that goes shares its mass out, one by one."""
    tokens = len(x)
    stay = tokens - protected - r
    chosen = sorted(sorted(range(protected, tokens), key=lambda t: (-float(score[t]), t))[:stay])
    direction = metric / ((metric**2).sum(-1, keepdim=True) + 1e-6).sqrt()
    mass, mixed = torch.zeros(stay, 1, dtype=x.dtype), torch.zeros(stay, x.shape[1], dtype=x.dtype)
    place = list(range(protected))
    for t in range(protected, tokens):
        if t in chosen:
            at = chosen.index(t)
            mass[at] += size[t]
            mixed[at] += size[t] * x[t]
            place.append(protected + at)
            continue
        share = torch.stack([direction[t] @ direction[c] for c in chosen]).div(temperature).softmax(0)[:, None]
        mass += share * size[t]
        mixed += share * size[t] * x[t]
        place.append(protected + int(share.argmax()))
    return torch.cat([x[:protected], mixed / mass]), torch.cat([size[:protected], mass]), torch.tensor(place)


@settings(deadline=None, max_examples=drawing.of(15, 60))
@given(layouts(), st.sampled_from([0.05, 1.0]), st.data())
def test_equals_a_loop_over_tokens_and_conserves(layout: Layout, temperature: float, data: st.DataObject) -> None:
    r, p = data.draw(st.integers(0, most_dropped(layout))), layout.protected
    results = call("transform_tokens", layout.x, layout.metric, layout.score, layout.size, r, p, temperature)
    images = zip(layout.x, layout.metric, layout.score, layout.counts, strict=True)
    by_hand = [transformed_by_hand(*image, r, p, temperature) for image in images]
    if r == 0:
        assert_identity(layout, results)
    else:
        assert_reduces(layout, r, results, by_hand)
    assert_conserves(layout, results)


def test_cold_is_hard_merging_and_hot_gives_all_the_same() -> None:
    x, metric, score = torch.randn(3, 12, 4), torch.randn(3, 12, 5), torch.rand(3, 12)
    cold, size, place = transform_tokens(x, metric, score, None, 6, 1, 1e-5)
    for image in range(3):
        for token in range(12 - 6):
            members = place[image] == token
            torch.testing.assert_close(cold[image, token], x[image, members].mean(0))
            assert size[image, token].item() == pytest.approx(int(members.sum()))
    hot, _, _ = transform_tokens(x, metric, score, None, 6, 1, 1e6)
    for image in range(3):
        kept = sorted(score[image, 1:].argsort(descending=True)[:5].add(1).tolist())
        gone = [t for t in range(1, 12) if t not in kept]
        want = (x[image, kept] + x[image, gone].sum(0) / 5) / (1 + 6 / 5)
        torch.testing.assert_close(hot[image, 1:], want)


def test_a_few_that_go_move_the_others_a_little() -> None:
    """As r falls to 0 the op nears the identity: a sixty-fourth of one token is all that a representative is given."""
    x, metric, score = torch.randn(2, 66, 8), torch.randn(2, 66, 5), torch.rand(2, 66)
    mixed, size, place = transform_tokens(x, metric, score, None, 1, 1, 1e6)
    for image in range(2):
        gone = int(score[image, 1:].argmin()) + 1
        stay = [t for t in range(66) if t != gone]
        torch.testing.assert_close(size[image, 1:], torch.full((64, 1), 1 + 1 / 64))
        moved = mixed[image] - x[image, stay]
        assert float(moved.norm()) < 0.03 * float(x[image].norm())
        assert place[image, stay].tolist() == list(range(65))


def test_zero_keys_share_evenly() -> None:
    x = torch.randn(2, 9, 4)
    mixed, size, _ = transform_tokens(x, torch.zeros(2, 9, 4), torch.rand(2, 9), None, 4, 1, 0.1)
    torch.testing.assert_close(size[:, 1:], torch.full((2, 4, 1), 2.0))
    torch.testing.assert_close((size * mixed).sum(1), x.sum(1))


def test_arguments_out_of_range_are_refused() -> None:
    x = torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match=r"removes 0 to 7, not 8"):
        call("transform_tokens", x, x, x[:, :, 0], None, 8, 1, 0.1)
    with pytest.raises(ValueError, match="temperature"):
        call("transform_tokens", x, x, x[:, :, 0], None, 3, 1, 0.0)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_sound(protected: int) -> None:
    x, metric, score = torch.randn(2, 20, 6), torch.randn(2, 20, 5), torch.rand(2, 20)
    size = torch.randint(1, 40, (2, 20, 1)).float()
    assert_sound("transform_tokens", (x, metric, score, size), (4, protected, 0.1))


def test_registered() -> None:
    tensors = (torch.randn(2, 9, 6), torch.randn(2, 9, 4), torch.rand(2, 9))
    assert_registered("transform_tokens", tensors, (None, 3, 1, 0.1))


@pytest.mark.parametrize(("tokens", "r", "protected"), [(9, 0, 1), (9, 3, 1), (10, 7, 0), (17, 4, 2)])
def test_macs_are_those_counted(tokens: int, r: int, protected: int) -> None:
    x, metric, score = torch.randn(3, tokens, 6), torch.randn(3, tokens, 5), torch.rand(3, tokens)
    others = {"r": r, "protected": protected, "temperature": 0.1}
    macs = assert_counted("transform_tokens", {"x": x, "metric": metric, "score": score, "size": None}, others)
    assert (macs > 0) == (r > 0)


def test_deploys_equal_tokens_included() -> None:
    size = torch.tensor([1.0, 2]).repeat(10)[None, :, None]
    tensors = (torch.randn(1, 20, 6), torch.randn(1, 20, 8), torch.rand(1, 20).softmax(-1), size)
    deployed = Deployed("transform_tokens", tensors, (7, 1, 0.1))
    deployed.assert_deploys(other_batch)
    x, metric = torch.randn(7, 20, 6), some_equal(7, 20, 8, 4, seed=0)
    tied = (x, metric, (3 * torch.rand(7, 20)).round(), torch.ones(7, 20, 1))
    wanted = transform_tokens(*tied, 7, 1, 0.1)
    # Equal representatives get equal shares, up to rounding: only their order by share is left to the backend.
    for got, want in zip(deployed.run(*tied)[:2], wanted[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
