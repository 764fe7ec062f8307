"""``fxprune::restore_tokens``: every token back, as the one that took it in."""

from __future__ import annotations

from torch import Tensor

from .library import Shape, define
from .order import take


def restore_tokens(x: Tensor, place: Tensor) -> Tensor:
    """``x[b, place[b, t]]``: [batch, tokens, width] of x [batch, fewer, width] and place [batch, tokens] in range.

    Merge, then unmerge: what token merging for dense prediction does before the head (Bolya and Hoffman 2023,
    arXiv:2303.17604, section 4.1). A token that was pruned has no place to come back from: its -1 is out of range.
    """
    return take(x, place)


def restore_macs(x: Shape, place: Shape) -> int:
    """Nothing is multiplied."""
    return 0


RESTORE = define("restore_tokens", "(Tensor x, Tensor place) -> Tensor", restore_tokens, restore_macs)
