"""``fxprune::remove_token``: one token less, the same one of every image."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Shape, define
from .reduction import count_up, sizes


def remove_token(x: Tensor, size: Tensor | None, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take the token at ``position`` out, for OPTIN's aligned removal (arXiv:2403.17921, A.9).

    x         [batch, tokens, width];  size [batch, tokens, 1], gathered along
    returns   x' [batch, tokens - 1, width], sizes, and the place of every token in x', -1 for the one that went
    """
    tokens = x.shape[1]
    if not 0 <= position < tokens:
        raise ValueError(f"There are {tokens} tokens, so none is at {position}.")
    size = sizes(x, size)
    cut = [torch.cat([t[:, :position], t[:, position + 1 :]], 1) for t in (x, size)]
    gone = count_up(0, 1, x) - 1
    place = torch.cat([count_up(0, position, x), gone, count_up(position, tokens - 1, x)], 1)
    return cut[0], cut[1], place


def remove_macs(x: Shape, size: Shape | None, position: int) -> int:
    """Nothing is multiplied."""
    return 0


REMOVE = define(
    "remove_token", "(Tensor x, Tensor? size, int position) -> (Tensor, Tensor, Tensor)", remove_token, remove_macs
)
