"""Elements by number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..table import NotTranslatedError, Op, translates


@translates("Gather", numbers=True)
def gather(op: Op, x: Any, index: Any) -> Tensor:
    """Rows of a table by number are an embedding; a single constant number takes its dimension away."""
    axis = op.attribute("axis", 0)
    if not isinstance(x, Tensor):
        raise NotTranslatedError("it picks from a single number")
    if not isinstance(index, Tensor):
        return x.select(axis, index)
    if axis == 0 and x.dim() == 2 and isinstance(x, nn.Parameter):
        return F.embedding(index, x)
    return x[(slice(None),) * (axis % x.dim()) + (index,)]


@translates("GatherElements")
def gather_elements(op: Op, x: Tensor, index: Tensor) -> Tensor:
    axis = op.attribute("axis", 0)
    index = index.to(torch.int64)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


@translates("GatherND")
def gather_nd(op: Op, x: Tensor, index: Tensor) -> Tensor:
    if op.attribute("batch_dims", 0):
        raise NotTranslatedError("it has dimensions of batches")
    return x[tuple(index.to(torch.int64).unbind(-1))]


@translates("ScatterND")
def scatter_nd(op: Op, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    how = op.attribute("reduction", "none")
    if how not in ("none", "add"):
        raise NotTranslatedError(f"what meets is made one by {how}")
    return x.index_put(tuple(index.to(torch.int64).unbind(-1)), values, accumulate=how == "add")


@translates("ScatterElements")
def scatter_elements(op: Op, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    axis, how = op.attribute("axis", 0), op.attribute("reduction", "none")
    index = index.to(torch.int64)
    index = torch.where(index < 0, index + x.shape[axis], index)
    if how == "none":
        return torch.scatter(x, axis, index, values)
    if how == "add":
        return torch.scatter_add(x, axis, index, values)
    raise NotTranslatedError(f"what meets is made one by {how}")


@translates("OneHot", known=(1, 2))
def one_hot(op: Op, index: Tensor, depth: tuple[Any, ...], values: tuple[Any, ...]) -> Tensor:
    axis, count = op.attribute("axis", -1), depth[0]
    index = torch.where(index < 0, index + count, index).to(torch.int64).unsqueeze(axis)
    places = torch.arange(count)
    behind = index.dim() - 1 - (axis % index.dim())
    hot = index == places.reshape(-1, *(1,) * behind)
    dtype = torch.float32 if any(isinstance(v, float) for v in values) else torch.int64
    return torch.where(hot, torch.tensor(values[1], dtype=dtype), torch.tensor(values[0], dtype=dtype))


@translates("Trilu", known=(1,))
def trilu(op: Op, x: Tensor, diagonal: tuple[Any, ...] | None = None) -> Tensor:
    place = diagonal[0] if diagonal else 0
    return torch.triu(x, place) if op.flag("upper", True) else torch.tril(x, place)
