"""Token pruning by weighted PageRank over the attention graph, and by similarity (Zero-TPrune)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .library import Shape, define
from .order import places, rank, take
from .prune import prune_tokens
from .reduction import EPS, check_counts, full, outline, similarity, unchanged, unit, with_protected


def pagerank(attention: Tensor, iterations: int, present: Tensor | None = None, emphasis: float = 1.0) -> Tensor:
    """Weighted PageRank of the tokens: each votes for those it attends to, with the weight of the votes it gets.

    ``s <- A^T s`` from equal shares, in each head. Rows of A sum to one, so s keeps its sum of one.

    attention   softmax attention, a row a query. [batch, heads, tokens, tokens]
    present     1 for tokens of the graph, 0 for tokens that left it: their rows and columns count as removed and the
                rows left as normalised again, without gathering the matrix. None: all are present. [batch, tokens]
    emphasis    the start value of the first token, in those of the others
    returns     [batch, heads, tokens], 0 for tokens that are not present
    """
    tokens = attention.shape[-1]
    start = torch.ones(tokens, dtype=attention.dtype, device=attention.device)
    start = torch.where(torch.arange(tokens, device=attention.device) == 0, start * emphasis, start)
    if present is None:
        # One row vector to multiply from the left, for every image and head.
        score = (start / (tokens - 1 + emphasis)).expand(*attention.shape[:2], 1, tokens)
        for _ in range(iterations):
            score = score @ attention
        return score.squeeze(2)
    here = present.to(attention.dtype)[:, None, :, None].expand(-1, attention.shape[1], -1, -1)
    left = here / (attention @ here).clamp_min(EPS)  # a row that looked at nothing but removed tokens votes for none
    here, left = here.transpose(2, 3), left.transpose(2, 3)
    score = here * start
    score = score / score.sum(-1, keepdim=True)
    for _ in range(iterations):
        score = (score * left) @ attention * here
    return score.squeeze(2)


def pagerank_tokens(
    x: Tensor,
    attention: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    similar: int,
    protected: int,
    iterations: int,
    lowest: float = 0.0,
    highest: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop ``similar`` tokens that resemble more important ones, then the least important up to ``r`` in all.

    Wang et al., "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph" (CVPR 2024), in the
    order I' -> S -> I. I': one step of weighted PageRank ranks the tokens. S: the less important half looks for its
    most similar token in the more important half; those most similar go. I: PageRank on the graph that is left; the
    lowest go. Importance over heads is their root mean square, which favours tokens that matter to one head. With a
    class token the first token starts at the root of the token count, as in the paper's default.

    x           [batch, tokens, width]
    attention   softmax attention of the block, a row a query. [batch, heads, tokens, tokens]
    metric      what tokens are compared by: the mean over heads of the block's keys. [batch, tokens, d]
    size        input tokens that each token stands for, None for ones; gathered along. [batch, tokens, 1]
    r           how many tokens go: 0 to tokens - protected - 1
    similar     how many of them go in the S stage: 0 to the smaller of r and (tokens - protected) // 2
    protected   the first so many tokens stay; they vote all the same
    iterations  steps of the I stage; the paper's: 30 to 50 in the first layers, 5 to 10 in the middle, 1 in the last
    lowest, highest   heads whose votes vary less or more between tokens do not count, unless none is left. The variance
                is that of votes with a mean of one; the paper names 0.01 and 0.7 and no scale. highest 0: all count
    returns     x' [batch, tokens - r, width] by position; their sizes; the place in x' of each token, -1 for those
                that went [batch, tokens]

    There is no official code.
    """
    tokens = x.shape[1]
    check_counts(tokens, r, protected, tokens - protected - 1)
    half = (tokens - protected) // 2
    if not 0 <= similar <= min(r, half):
        raise ValueError(f"Of {r} tokens to remove, 0 to {min(r, half)} can go for their similarity, not {similar}.")
    if iterations < 1:
        raise ValueError(f"PageRank takes at least one iteration, not {iterations}.")
    if not 0 <= lowest <= max(highest, 0.0):
        raise ValueError(f"The variance of a head's votes lies between 0 and a highest value, not {lowest}, {highest}.")
    if r == 0:
        return unchanged(x, size)
    attention = full(attention)
    present = None
    if similar:
        emphasis = math.sqrt(tokens) if protected else 1.0
        importance = _over_heads(pagerank(attention, 1, emphasis=emphasis), tokens, lowest, highest)
        present = with_protected(~_resembling(importance, unit(metric), similar, protected), protected)
    if r == similar:
        assert present is not None
        return prune_tokens(x, present.to(x.dtype), size, r, protected)
    emphasis = math.sqrt(tokens - similar) if protected else 1.0
    importance = _over_heads(pagerank(attention, iterations, present, emphasis), tokens - similar, lowest, highest)
    if present is not None:
        importance = torch.where(present, importance, -1.0)
    return prune_tokens(x, importance, size, r, protected)


def _over_heads(score: Tensor, present: int, lowest: float, highest: float) -> Tensor:
    """The root mean square over heads of ``score`` [batch, heads, tokens], in steps of 1/4096 of its mean over tokens.

    The steps make ties of tokens that only rounding tells apart, as all are where attention is doubly stochastic.

    present   how many tokens have votes at all;  lowest, highest: see :func:`pagerank_tokens`
    """
    square = score * score
    if highest <= 0:
        return (square.mean(1).sqrt() * (4096 * score.shape[-1])).round()
    variance = present * square.sum(-1, keepdim=True) - 1  # votes sum to one: the mean is 1 / present
    counts = ((variance >= lowest) & (variance <= highest)).to(score.dtype)
    counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, 1.0)
    return (((square * counts).sum(1) / counts.sum(1)).sqrt() * (4096 * score.shape[-1])).round()


def _resembling(importance: Tensor, towards: Tensor, count: int, protected: int) -> Tensor:
    """Which ``count`` unprotected tokens of the less important half resemble one of the other half the most.

    importance  [batch, tokens]
    towards     unit directions of the tokens. [batch, tokens, d]
    returns     [batch, tokens - protected] bool, ties by position
    """
    n = importance.shape[1] - protected
    more = rank(importance[:, protected:]) < n - n // 2
    of_more, _ = places(more, n - n // 2)
    of_less, place = places(~more, n // 2)
    alike = similarity(take(towards, of_less + protected), take(towards, of_more + protected))
    resembles = rank(alike.amax(-1)) < count
    return resembles.gather(1, place.clamp_min(0)) & ~more


def pagerank_macs(
    x: Shape,
    attention: Shape,
    metric: Shape,
    size: Shape | None,
    r: int,
    similar: int,
    protected: int,
    iterations: int,
    lowest: float = 0.0,
    highest: float = 0.0,
) -> int:
    """Votes of I' and I, the row sums of what is left, and the similarities of S. Of one sample."""
    n, step = x[1] - protected, attention[1] * x[1] * x[1]
    total = 0
    if similar:
        total += step + (n // 2) * (n - n // 2) * metric[2]
    if r > similar:
        total += step * (iterations + bool(similar))
    return total


PAGERANK = define(
    "pagerank_tokens",
    "(Tensor x, Tensor attention, Tensor metric, Tensor? size, int r, int similar, int protected, int iterations,"
    " float lowest=0.0, float highest=0.0)"
    " -> (Tensor, Tensor, Tensor)",
    pagerank_tokens,
    pagerank_macs,
    outline,
)
