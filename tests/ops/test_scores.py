"""Attention weights and token scores on hand-made matrices, against loops, and the laws of an op."""

from __future__ import annotations

import math

import pytest
import torch
from support.token_laws import Deployed, assert_counted, assert_registered, call, other_batch
from torch import Tensor

from fxprune.ops.scores import KINDS, attention_map, token_score


def scored_by_hand(attention: Tensor, value: Tensor, kind: str, protected: int) -> Tensor:
    """One image [heads, rows, tokens], token by token."""
    heads, _, tokens = attention.shape
    scores = [0.0] * tokens
    for t in range(protected, tokens):
        if kind.startswith("class"):
            seen = sum(float(attention[h, 0, t]) for h in range(heads))
        elif kind == "entropy-value":
            seen = sum(-w * math.log(w + 1e-8) for w in attention[:, t].flatten().tolist())
        else:
            seen = float(attention[:, :, t].sum())
        scores[t] = seen * (1.0 if kind == "class" else math.sqrt(float(value[:, t].square().sum())))
    return torch.tensor(scores, dtype=attention.dtype) / sum(scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [1, 2, 5])
def test_scores_equal_a_loop_over_tokens(kind: str, protected: int) -> None:
    attention = torch.randn(3, 4, 9, 9, dtype=torch.float64).softmax(-1)
    value = torch.randn(3, 4, 9, 5, dtype=torch.float64)
    score = token_score(attention, value, kind, protected)
    for image in range(3):
        torch.testing.assert_close(score[image], scored_by_hand(attention[image], value[image], kind, protected))
    torch.testing.assert_close(score.sum(-1), torch.ones(3, dtype=torch.float64))
    assert score[:, :protected].eq(0).all()
    if kind.startswith("class"):
        assert torch.equal(token_score(attention[:, :, :1], value, kind, protected), score)


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_attention_scores_by_the_norm_of_values(kind: str) -> None:
    value = torch.ones(1, 2, 4, 2)
    value[:, :, 2] = 3
    score = token_score(torch.full((1, 2, 4, 4), 0.25), value, kind, 1)
    even = kind == "class"
    torch.testing.assert_close(score, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3] if even else [0, 0.2, 0.6, 0.2]]))


def test_scores_without_a_class_token() -> None:
    attention, value = torch.rand(2, 2, 6, 6).softmax(-1), torch.randn(2, 2, 6, 3)
    for kind in ("entropy-value", "received-value"):
        torch.testing.assert_close(token_score(attention, value, kind, 0).sum(-1), torch.ones(2))


def test_values_of_zero_score_zero() -> None:
    score = token_score(torch.full((1, 2, 4, 4), 0.25), torch.zeros(1, 2, 4, 3), "class-value", 1)
    assert score.eq(0).all()


def test_what_cannot_be_scored_is_refused() -> None:
    attention, value = torch.rand(1, 2, 6, 6), torch.rand(1, 2, 6, 3)
    for row, kind, protected, sentence in (
        (6, "loudness", 1, "one of class-value, class, entropy-value, received-value, not 'loudness'"),
        (6, "class", 0, "at least one token is protected"),
        (6, "class", 6, "'protected' cannot be 6"),
        (1, "entropy-value", 1, "attention of all 6 tokens, not of 1"),
        (2, "received-value", 1, "attention of all 6 tokens, not of 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call("token_score", attention[:, :, :row], value, kind, protected)
    for rows in (-1, 7):
        with pytest.raises(ValueError, match="'rows' cannot be"):
            call("attention_map", value, value, None, 1.0, rows)


def test_a_key_of_size_two_is_two_keys() -> None:
    """methods 11.13"""
    query, key = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    size = torch.ones(2, 5, 1, dtype=torch.float64)
    size[:, 3] = 2
    weight = attention_map(query, key, size, 0.3, 0)
    twice = attention_map(query, torch.cat([key, key[:, :, 3:4]], 2), None, 0.3, 0)
    torch.testing.assert_close(weight[..., 3], twice[..., 3] + twice[..., 5], rtol=0, atol=1e-15)
    torch.testing.assert_close(weight[..., :3], twice[..., :3], rtol=0, atol=1e-15)


def test_attention_is_what_fused_attention_uses() -> None:
    query, key, value = torch.randn(3, 2, 3, 5, 8).unbind(0)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    weight = attention_map(query, key, None, 8**-0.5, 0)
    torch.testing.assert_close(weight @ value, fused)
    torch.testing.assert_close(attention_map(query, key, None, 8**-0.5, 2), weight[:, :, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    query, key = (100 * torch.randn(2, 2, 3, 9, 64)).to(dtype).unbind(0)  # q k^T overflows, scaled it does not
    weight = attention_map(query, key, torch.randint(1, 200, (2, 9, 1)).to(dtype), 1 / 8, 0)
    assert weight.dtype == dtype
    assert weight.isfinite().all()
    mild = torch.randn(2, 3, 9, 9).softmax(-1).to(dtype)
    for kind in KINDS:
        score = token_score(mild, (200 * torch.randn(2, 3, 9, 64)).to(dtype), kind, 1)
        assert score.isfinite().all()
        torch.testing.assert_close(score.sum(-1), torch.ones(2))


def test_gradients() -> None:
    query = torch.randn(2, 3, 6, 4, requires_grad=True)
    token_score(attention_map(query, query, None, 0.5, 0), query, "entropy-value", 1).square().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert query.grad.abs().sum() > 0


def test_registered() -> None:
    query = torch.randn(2, 3, 6, 4)
    assert_registered("attention_map", (query, query + 1), (torch.ones(2, 6, 1), 0.5, 1))
    assert_registered("token_score", (torch.rand(2, 3, 6, 6), query), ("entropy-value", 1))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_macs_are_those_counted(rows: int) -> None:
    tensors = {"query": torch.randn(3, 2, 7, 4), "key": torch.randn(3, 2, 7, 4), "size": torch.ones(3, 7, 1)}
    assert assert_counted("attention_map", tensors, {"scale": 0.5, "rows": rows}) == 2 * (rows or 7) * 7 * 4
    for kind in KINDS:
        scored = {"attention": torch.rand(3, 2, 7, 7), "value": torch.randn(3, 2, 7, 4)}
        assert assert_counted("token_score", scored, {"kind": kind, "protected": 1}) == 0


def test_attention_deploys() -> None:
    query, key, size = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.tensor([1.0, 2, 3] * 3)[None, :, None]
    Deployed("attention_map", (query, key, size), (0.5, 1)).assert_deploys(other_batch)


@pytest.mark.parametrize("kind", ["class-value", "entropy-value"])
def test_scores_deploy(kind: str) -> None:
    tensors = (torch.randn(1, 2, 9, 9).softmax(-1), torch.randn(1, 2, 9, 4))
    Deployed("token_score", tensors, (kind, 1)).assert_deploys(other_batch)
