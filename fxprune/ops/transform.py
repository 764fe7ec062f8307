"""Many-to-many token transforming: every token shares itself out among those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Shape, define
from .order import places, rank, take
from .reduction import check_counts, count_up, full, sizes, unchanged, unit


def transform_tokens(
    x: Tensor, metric: Tensor, score: Tensor, size: Tensor | None, r: int, protected: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Share all tokens out among the unprotected ones of the highest scores, all but ``r``, by similarity.

    Token Transforming (2025) writes every reduction as ``X' = T X`` and lets columns of T be shared, where merging
    gives each token to one other. Its T could not be read from published code; this one keeps the contract:
    ``P[m, n] = softmax over representatives m of cos(k_m, k_n) / temperature``, ``s' = P s``,
    ``X' = diag(1 / s') P diag(s) X``. Columns of P sum to one, so sizes keep their sum and tokens their mean by size.
    Temperature to 0 gives every token to its most similar representative, to infinity the same mean to all.

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
    kept, _ = places(rank(score[:, protected:]) < left, left)
    direction = unit(metric)
    similarity = torch.bmm(direction[:, protected:], take(direction, kept + protected).transpose(1, 2))
    share = (similarity / temperature).softmax(-1)  # P transposed: [batch, tokens, representatives]
    mass = share * full(size[:, protected:])
    total = mass.sum(1, keepdim=True)
    mixed = torch.bmm((mass / total).to(x.dtype).transpose(1, 2), x[:, protected:])
    place = torch.cat([count_up(0, protected, x), share.argmax(-1) + protected], 1)
    total = total.transpose(1, 2).to(size.dtype)
    return torch.cat([x[:, :protected], mixed], 1), torch.cat([size[:, :protected], total], 1), place


def transform_macs(
    x: Shape, metric: Shape, score: Shape, size: Shape | None, r: int, protected: int, temperature: float
) -> int:
    """Similarities to the representatives, and the shares times the tokens. Of one sample."""
    n = x[1] - protected
    return 0 if r == 0 else n * (n - r) * (metric[2] + x[2])


TRANSFORM = define(
    "transform_tokens",
    "(Tensor x, Tensor metric, Tensor score, Tensor? size, int r, int protected, float temperature)"
    " -> (Tensor, Tensor, Tensor)",
    transform_tokens,
    transform_macs,
)
