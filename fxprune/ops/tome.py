"""Token merging by bipartite soft matching (ToMe)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Shape, define
from .order import places, rank, take
from .reduction import check_counts, count_up, full, outline, similarity, sizes, unchanged, unit


def merge_tokens(
    x: Tensor, metric: Tensor, size: Tensor | None, r: int, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``r`` tokens into tokens like them, each result the mean of the input tokens that it stands for.

    Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), section 3. Tokens are split by position, even ones
    into A and odd ones into B; each a finds its most similar b by the cosine of the metric; the r best pairs merge:
    ``x'_b = (s_b x_b + sum_{a -> b} s_a x_a) / s'_b`` with ``s'_b = s_b + sum_{a -> b} s_a``. Ties go to the lowest
    index.

    x          [batch, tokens, width]
    metric     what tokens are compared by: the mean over heads of the block's keys. [batch, tokens, d]
    size       input tokens that each token stands for, None for ones. [batch, tokens, 1]
    r          how many tokens go: 0 to (tokens - protected) // 2
    protected  the first so many tokens neither merge nor are merged into
    returns    x' [batch, tokens - r, width] in the order protected, unmerged A, B, each by position; their sizes;
               the place in x' of the token that took each input token [batch, tokens]

    Differs from the reference code: protected tokens are left out of A and B instead of masked, which is the same for
    a class token (0, in A) and for a class and a distillation token (0 in A, 1 in B) and holds for registers too.
    Unmerged A tokens come by position also where no token is protected; the code leaves them by similarity then. Norms
    have an epsilon and cosines a grid (see ``reduction.similarity``). Weights are divided before they multiply
    tokens, so that nothing overflows in half precision.
    """
    tokens = x.shape[1]
    check_counts(tokens, r, protected, (tokens - protected) // 2)
    if r == 0:
        return unchanged(x, size)
    size = sizes(x, size)
    a, b = _sides(protected)
    towards = unit(metric)
    alike = similarity(towards[:, a::2], towards[:, b::2])
    best, target = alike.max(-1)
    givers, takers = alike.shape[1:]

    goes = rank(best) < r
    source, _ = places(goes, r)
    gives = target.gather(1, source)[:, None, :] == torch.arange(takers, device=x.device)[:, None]
    given = gives.to(alike.dtype) * full(take(size, source * 2 + a)).transpose(1, 2)  # [batch, takers, r]
    own = full(size[:, b::2])
    total = own + given.sum(-1, keepdim=True)
    merged = x[:, b::2] * (own / total).to(x.dtype)
    merged = merged + torch.bmm((given / total).to(x.dtype), take(x, source * 2 + a))

    stays, place = places(~goes, givers - r)
    first_b = protected + givers - r
    of_a = torch.where(goes, target + first_b, place + protected)
    of_b = count_up(first_b, first_b + takers, x)
    place = torch.cat([count_up(0, protected, x), _alternating(of_a, of_b) if a < b else _alternating(of_b, of_a)], 1)
    parts, counts = [x[:, :protected]], [size[:, :protected]]
    if r < givers:  # no part of length zero: runtimes differ on them
        parts.append(take(x, stays * 2 + a))
        counts.append(take(size, stays * 2 + a))
    return torch.cat([*parts, merged], 1), torch.cat([*counts, total.to(size.dtype)], 1), place


def _sides(protected: int) -> tuple[int, int]:
    """The first unprotected position of A (even) and of B (odd)."""
    return protected + protected % 2, protected + (protected + 1) % 2


def _alternating(one: Tensor, two: Tensor) -> Tensor:
    """Columns of ``one`` and ``two`` in turn; ``one`` may have one more. [batch, n + m]"""
    n, m = one.shape[1], two.shape[1]
    if n > m:
        two = torch.cat([two, two[:, :1]], 1)  # a partner for the last one, cut off again
    return torch.stack([one, two], -1).flatten(1)[:, : n + m]


def merge_macs(x: Shape, metric: Shape, size: Shape | None, r: int, protected: int) -> int:
    """Similarities of A and B, and the r tokens summed into B. Of one sample."""
    if r == 0:
        return 0
    a, b = _sides(protected)
    givers, takers = len(range(a, x[1], 2)), len(range(b, x[1], 2))
    return takers * (givers * metric[2] + r * x[2])


MERGE = define(
    "merge_tokens",
    "(Tensor x, Tensor metric, Tensor? size, int r, int protected) -> (Tensor, Tensor, Tensor)",
    merge_tokens,
    merge_macs,
    outline,
)
