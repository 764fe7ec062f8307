"""Sorting by counting: the same order on every backend, ties included."""

from __future__ import annotations

import torch
from torch import Tensor


def descending(values: Tensor) -> Tensor:
    """Positions of ``values`` [batch, n] by descending value, ties by index. [batch, n] int64

    ``rank[i] = #{j: v_j > v_i or (v_j = v_i and j < i)}``; a one-hot of the ranks turns them into positions. n^2
    comparisons, no sort: sort and topk leave ties to the kernel, and a stable sort has no ONNX translation.
    """
    index = torch.arange(values.shape[-1], device=values.device)
    row, column = values[:, :, None], values[:, None, :]
    before = (column > row) | ((column == row) & (index[None, :] < index[:, None]))
    rank = before.sum(-1)
    return ((rank[:, None, :] == index[:, None]) * index).sum(-1)


def ascending(positions: Tensor) -> Tensor:
    """Distinct ``positions`` [batch, n] in ascending order."""
    return positions.gather(1, descending(-positions))


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Rows ``positions`` [batch, n] of ``values`` [batch, tokens, width]. [batch, n, width]"""
    return values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[-1]))
