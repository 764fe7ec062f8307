"""Tensors from nothing but sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph import DTYPES
from ..table import Op, translates


@translates("ConstantOfShape", known=(0,))
def constant_of_shape(op: Op, sizes: tuple[Any, ...]) -> Tensor:
    value = op.attribute("value")
    if value is None:
        return torch.zeros(tuple(sizes))
    return torch.full(tuple(sizes), value.item(), dtype=value.dtype)


@translates("Range", known=(0, 1, 2))
def numbers_in_turn(op: Op, first: tuple[Any, ...], limit: tuple[Any, ...], step: tuple[Any, ...]) -> Tensor:
    return torch.arange(first[0], limit[0], step[0])


@translates("EyeLike")
def eye_like(op: Op, x: Tensor) -> Tensor:
    dtype = DTYPES.get(op.attribute("dtype", 0), x.dtype)
    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
    return (columns - rows == op.attribute("k", 0)).to(dtype)
