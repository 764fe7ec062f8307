"""Token pruning or pooling, chosen for each image by how uneven its scores are (PPT)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Shape, define
from .prune import prune_tokens
from .reduction import check_counts, full, outline, unchanged
from .tome import merge_macs, merge_tokens


def adapt_tokens(
    x: Tensor, metric: Tensor, score: Tensor, size: Tensor | None, r: int, protected: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune ``r`` tokens of an image whose scores are uneven, merge ``r`` of one whose scores are alike.

    Wu et al., "PPT: Token Pruning and Pooling for Efficient Vision Transformers" (2023), equation 3.3. Both results
    have the same shape: both are computed and each image takes its own, so that shapes stay static.

    x          [batch, tokens, width]
    metric     what tokens are compared by, as in ``merge_tokens``. [batch, tokens, d]
    score      as in ``prune_tokens``. [batch, tokens]
    size       input tokens that each token stands for, None for ones. [batch, tokens, 1]
    r          how many tokens go: 0 to (tokens - protected) // 2
    protected  the first so many tokens stay as they are
    threshold  prune where the squared coefficient of variation (unbiased variance over squared mean) of the scores of
               unprotected tokens reaches it: 0 always prunes, a huge one always merges
    returns    x' [batch, tokens - r, width]; their sizes; the place in x' of each token, -1 where it was pruned

    Differs from the reference code: it compares the bare variance of scores that sum to one, whose scale falls with
    the square of the token count; variance tau is threshold tau (tokens - protected)^2 here (7e-5 is 2.69, 1.49 and
    0.65 at 197, 147 and 97 tokens). Pruned images keep position order (see ``prune_tokens``).
    """
    tokens = x.shape[1]
    check_counts(tokens, r, protected, (tokens - protected) // 2)
    if r == 0:
        return unchanged(x, size)
    scores = full(score[:, protected:])
    mean = scores.mean(-1, keepdim=True)
    variance = ((scores - mean) ** 2).sum(-1, keepdim=True) / (tokens - protected - 1)
    uneven = variance >= threshold * mean * mean  # not divided: scores may all be zero
    pruned = prune_tokens(x, score, size, r, protected)
    merged = merge_tokens(x, metric, size, r, protected)
    return (
        torch.where(uneven[:, :, None], pruned[0], merged[0]),
        torch.where(uneven[:, :, None], pruned[1], merged[1]),
        torch.where(uneven, pruned[2], merged[2]),
    )


def adapt_macs(
    x: Shape, metric: Shape, score: Shape, size: Shape | None, r: int, protected: int, threshold: float
) -> int:
    """Those of merging, which is computed for every image."""
    return merge_macs(x, metric, size, r, protected)


ADAPT = define(
    "adapt_tokens",
    "(Tensor x, Tensor metric, Tensor score, Tensor? size, int r, int protected, float threshold)"
    " -> (Tensor, Tensor, Tensor)",
    adapt_tokens,
    adapt_macs,
    outline,
)
