"""Many-to-many token transforming: every token that goes shares itself out among those that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import Shape, define
from .order import places, rank, take
from .reduction import check_counts, count_up, full, outline, sizes, unchanged, unit


def transform_tokens(
    x: Tensor, metric: Tensor, score: Tensor, size: Tensor | None, r: int, protected: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Share the ``r`` unprotected tokens of the lowest scores out among the others, by similarity.

    Token Transforming (2025) writes every reduction as ``X' = T X`` and lets columns of T be shared, where merging
    gives each token to one other. Its T could not be read from published code; this one keeps the contract:
    ``P[m, n] = softmax over representatives m of cos(k_m, k_n) / temperature`` where n goes, 1 where n = m stays,
    ``s' = P s``, ``X' = diag(1 / s') P diag(s) X``. Columns of P sum to one, so sizes keep their sum and tokens their
    mean by size. Those that stay keep themselves: sharing them out as well blurs all of them, however few go (a ViT
    lost four points at 0.9 of its cost). Temperature to 0 gives every token that goes to its most similar
    representative, to infinity the same share to all.

    x            [batch, tokens, width]
    metric       what tokens are compared by: the mean over heads of the block's keys. [batch, tokens, d]
    score        the highest are the representatives, of equal ones the lower index. [batch, tokens]
    size         input tokens that each token stands for, None for ones. [batch, tokens, 1]
    r            how many tokens go: 0 to tokens - protected - 1
    protected    the first so many tokens stay as they are and take no share
    temperature  above 0; 0.05 to 0.1 is a start
    returns      x' [batch, tokens - r, width]: protected tokens, then representatives by position; their sizes, no
                 longer whole; the place in x' of the largest share of each token [batch, tokens]
    """
    tokens = x.shape[1]
    check_counts(tokens, r, protected, tokens - protected - 1)
    if not temperature > 0:
        raise ValueError(f"The temperature of a softmax is above 0, not {temperature}.")
    if r == 0:
        return unchanged(x, size)
    size = sizes(x, size)
    left = tokens - protected - r
    stays = rank(score[:, protected:]) < left
    kept, own = places(stays, left)
    gone, order = places(~stays, r)
    kept, gone, direction = kept + protected, gone + protected, unit(metric)
    similarity = torch.bmm(take(direction, gone), take(direction, kept).transpose(1, 2))
    share = (similarity / temperature).softmax(-1)  # P transposed, of those that go: [batch, r, representatives]
    mass, mine = share * full(take(size, gone)), full(take(size, kept))
    total = mine + mass.sum(1)[:, :, None]
    given = torch.bmm((mass.transpose(1, 2) / total).to(x.dtype), take(x, gone))
    mixed = (mine / total).to(x.dtype) * take(x, kept) + given
    there = torch.where(stays, own, share.argmax(-1).gather(1, order.clamp_min(0)))
    place = torch.cat([count_up(0, protected, x), there + protected], 1)
    return torch.cat([x[:, :protected], mixed], 1), torch.cat([size[:, :protected], total.to(size.dtype)], 1), place


def transform_macs(
    x: Shape, metric: Shape, score: Shape, size: Shape | None, r: int, protected: int, temperature: float
) -> int:
    """Similarities to the representatives, and the shares times the tokens. Of one sample."""
    return r * (x[1] - protected - r) * (metric[2] + x[2])


def _outline(x: Tensor, size: Tensor | None, r: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As of every reducer; sizes are shares, and have a gradient as they have."""
    fewer, sizes, place = outline(x, size, r)
    return fewer, sizes.requires_grad_(fewer.requires_grad) if r else sizes, place


TRANSFORM = define(
    "transform_tokens",
    "(Tensor x, Tensor metric, Tensor score, Tensor? size, int r, int protected, float temperature)"
    " -> (Tensor, Tensor, Tensor)",
    transform_tokens,
    transform_macs,
    _outline,
)
