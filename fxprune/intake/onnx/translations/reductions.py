"""Fewer elements: sums, means, the largest, running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..table import NotTranslatedError, Op, translates


def _times(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


_REDUCED: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _times,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(x.sum(axes, keepdim=keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


def _reduce(op: Op, x: Tensor, axes: tuple[int, ...] | None, do: Callable[..., Tensor]) -> Tensor:
    over = op.attribute("axes") if axes is None else axes
    if not over and op.flag("noop_with_empty_axes"):
        return x
    return do(x, tuple(over) if over else tuple(range(x.dim())), op.flag("keepdims", True))


for _name, _do in _REDUCED.items():
    translates(_name, known=(1,))(lambda op, x, axes=None, do=_do: _reduce(op, x, axes, do))


@translates("ArgMax")
def arg_max(op: Op, x: Tensor) -> Tensor:
    return _place(op, x, torch.argmax)


@translates("ArgMin")
def arg_min(op: Op, x: Tensor) -> Tensor:
    return _place(op, x, torch.argmin)


def _place(op: Op, x: Tensor, do: Callable[..., Tensor]) -> Tensor:
    if op.flag("select_last_index"):
        raise NotTranslatedError("it takes the last of equal ones")
    return do(x, op.attribute("axis", 0), keepdim=op.flag("keepdims", True))


@translates("TopK", known=(1,))
def top_k(op: Op, x: Tensor, count: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    values, places = torch.topk(
        x, count[0], op.attribute("axis", -1), op.flag("largest", True), op.flag("sorted", True)
    )
    return values, places


@translates("CumSum", known=(1,))
def cum_sum(op: Op, x: Tensor, axis: tuple[int, ...]) -> Tensor:
    dim = axis[0]
    turned = x.flip(dim) if op.flag("reverse") else x
    summed = torch.cumsum(turned, dim, dtype=x.dtype)
    summed = summed - turned if op.flag("exclusive") else summed
    return summed.flip(dim) if op.flag("reverse") else summed
