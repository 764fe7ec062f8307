"""Rank correlation, which criteria and recovery are judged by."""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors, ties at their mean rank; 0 where one of them is constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])), 6)
    1.0
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return min(1.0, max(-1.0, float(x @ y) / scale)) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, index, count = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[index]
