"""Sorting by counting: the same order on every backend, ties included.

No sort and no topk: those leave ties to the kernel, and a stable sort has no ONNX translation. Counts are summed in
single precision, exact far beyond any number of tokens, because runtimes are ten times slower at sums of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COUNT = torch.float32


def rank(values: Tensor) -> Tensor:
    """How many of ``values`` [batch, n] come before each one by descending value, ties by index. [batch, n]

    ``rank[i] = #{j: v_j > v_i or (v_j = v_i and j < i)}``, n^2 comparisons.
    """
    row, column = values[:, :, None], values[:, None, :]
    before = (column > row) | ((column == row) & _earlier(values.shape[-1], values.device))
    return before.to(_COUNT).sum(-1)


def places(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the ``count`` true ones of ``chosen`` [batch, n], and the place of each position among them.

    returns  positions in ascending order [batch, count], always in range, even where NaN made the count wrong; places,
             -1 where not chosen [batch, n]
    """
    n, device = chosen.shape[-1], chosen.device
    before = (chosen[:, None, :] & _earlier(n, device)).to(_COUNT).sum(-1)
    place = torch.where(chosen, before, -1.0)
    index = torch.arange(n, device=device, dtype=_COUNT)
    positions = ((place[:, None, :] == index[:count, None]).to(_COUNT) * index).sum(-1)
    return positions.to(torch.int64), place.to(torch.int64)


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Rows ``positions`` [batch, n] of ``values`` [batch, tokens, width]. [batch, n, width]

    One look-up of whole rows in the flattened batch, where a gather would look up every element.
    """
    first = torch.arange(values.shape[0], device=values.device) * values.shape[1]
    return torch.nn.functional.embedding(positions + first[:, None], values.flatten(0, 1))


def _earlier(n: int, device: torch.device) -> Tensor:
    """[n, n]: whether the column stands before the row."""
    index = torch.arange(n, device=device)
    return index[None, :] < index[:, None]
