"""Token pruning by a score."""

from __future__ import annotations

from torch import Tensor

from .library import Shape, define
from .order import places, rank, take
from .reduction import check_counts, outline, sizes, unchanged, with_protected


def prune_tokens(
    x: Tensor, score: Tensor, size: Tensor | None, r: int, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the ``r`` unprotected tokens of the lowest score; of equal scores the higher index goes.

    The pruning branch of PPT (Wu et al., "PPT: Token Pruning and Pooling for Efficient Vision Transformers", 2023,
    section 3.3), and of any other score.

    x          [batch, tokens, width]
    score      the higher, the more a token matters; those of protected tokens are not read. [batch, tokens]
    size       input tokens that each token stands for, None for ones; gathered along. [batch, tokens, 1]
    r          how many tokens go: 0 to tokens - protected - 1
    protected  the first so many tokens stay
    returns    x' [batch, tokens - r, width] by position; their sizes; the place in x' of each token, -1 for those that
               went [batch, tokens]

    Differs from the reference code: survivors come by position, where the code leaves them by score (which scrambles
    the alternating split of a merge that follows), and every protected token stays, where the code keeps the class
    token only.
    """
    tokens = x.shape[1]
    check_counts(tokens, r, protected, tokens - protected - 1)
    if r == 0:
        return unchanged(x, size)
    stays = rank(score[:, protected:]) < tokens - protected - r
    kept, place = places(with_protected(stays, protected), tokens - r)
    return take(x, kept), take(sizes(x, size), kept), place


def prune_macs(x: Shape, score: Shape, size: Shape | None, r: int, protected: int) -> int:
    """Nothing is multiplied."""
    return 0


PRUNE = define(
    "prune_tokens",
    "(Tensor x, Tensor score, Tensor? size, int r, int protected) -> (Tensor, Tensor, Tensor)",
    prune_tokens,
    prune_macs,
    outline,
)
