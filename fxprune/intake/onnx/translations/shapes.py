"""The same elements otherwise: reshaped, moved, cut, joined, repeated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..known import Known, as_known
from ..table import NotTranslatedError, Op, translates

Sizes = tuple[Any, ...]


@translates("Shape")
def shape(op: Op, x: Tensor) -> Known:
    first, last, _ = slice(op.attribute("start", 0), op.attribute("end")).indices(x.dim())
    return as_known(list(x.shape[first:last]), torch.int64)


@translates("Size")
def size(op: Op, x: Tensor) -> Known:
    return as_known(x.numel(), torch.int64)


@translates("Reshape", known=(1,))
def reshape(op: Op, x: Tensor, sizes: Sizes) -> Tensor:
    keep = not op.flag("allowzero")
    return x.reshape([x.shape[i] if keep and isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)])


@translates("Flatten")
def flatten(op: Op, x: Tensor) -> Tensor:
    axis = op.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(axis) if axis == 1 and x.dim() > 1 else _two_sided(x, axis)


def _two_sided(x: Tensor, axis: int) -> Tensor:
    if axis == x.dim():
        return x.reshape(-1, 1)
    return x.flatten(0, axis - 1).flatten(1)


@translates("Transpose")
def transpose(op: Op, x: Tensor) -> Tensor:
    return x.permute(op.attribute("perm") or tuple(reversed(range(x.dim()))))


@translates("Squeeze", known=(1,))
def squeeze(op: Op, x: Tensor, axes: Sizes | None = None) -> Tensor:
    places = op.attribute("axes") if axes is None else axes
    return x.squeeze() if places is None else x.squeeze(tuple(places))


@translates("Unsqueeze", known=(1,))
def unsqueeze(op: Op, x: Tensor, axes: Sizes | None = None) -> Tensor:
    places = op.attribute("axes") if axes is None else axes
    for place in sorted(p % (x.dim() + len(places)) for p in places):
        x = x.unsqueeze(place)
    return x


@translates("Expand", known=(1,))
def expand(op: Op, x: Tensor, sizes: Sizes) -> Tensor:
    rank = max(x.dim(), len(sizes))
    own = (1,) * (rank - x.dim()) + tuple(x.shape)
    asked = (1,) * (rank - len(sizes)) + tuple(sizes)
    return x.expand(
        [mine if isinstance(want, int) and want == 1 else want for mine, want in zip(own, asked, strict=True)]
    )


@translates("Tile", known=(1,))
def tile(op: Op, x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(tuple(repeats))


@translates("Concat")
def concat(op: Op, *parts: Tensor) -> Tensor:
    return torch.cat(parts, op.attribute("axis"))


@translates("Split", known=(1,))
def split(op: Op, x: Tensor, sizes: Sizes | None = None) -> tuple[Tensor, ...]:
    axis, asked = op.attribute("axis", 0), op.attribute("split") if sizes is None else sizes
    if asked is None:
        return torch.split(x, -(-x.shape[axis] // op.outputs), axis)
    return torch.split(x, list(asked), axis)


@translates("Slice", known=(1, 2, 3, 4))
def cut(
    op: Op,
    x: Tensor,
    starts: Sizes | None = None,
    ends: Sizes | None = None,
    axes: Sizes | None = None,
    steps: Sizes | None = None,
) -> Tensor:
    starts, ends = starts or op.attribute("starts"), ends or op.attribute("ends")
    axes = axes or op.attribute("axes") or tuple(range(len(starts)))
    for axis, start, end, step in zip(axes, starts, ends, steps or (1,) * len(starts), strict=True):
        x = _run(x, axis, start, end, step)
    return x


def _run(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    if step < 0:
        whole = x.shape[axis]
        if not all(isinstance(n, int) for n in (whole, start, end)):
            raise NotTranslatedError("it runs backwards over an open size")
        first, last, _ = slice(start, None if end < -whole else end, step).indices(whole)
        places = list(range(first, last, step))
        if places == list(reversed(range(whole))):
            return x.flip(axis)
        return x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    ends = None if isinstance(end, int) and end >= 2**31 - 1 else end
    index = [slice(None)] * x.dim()
    index[axis] = slice(start, ends, step)
    return x[tuple(index)]


@translates("Pad", known=(1, 2, 3))
def pad(op: Op, x: Tensor, pads: Sizes | None = None, value: Sizes | None = None, axes: Sizes | None = None) -> Tensor:
    mode = op.attribute("mode", "constant")
    pads = op.attribute("pads") if pads is None else pads
    places = tuple(range(x.dim())) if axes is None else tuple(a % x.dim() for a in axes)
    front, behind = dict.fromkeys(range(x.dim()), 0), dict.fromkeys(range(x.dim()), 0)
    front.update(zip(places, pads[: len(places)], strict=True))
    behind.update(zip(places, pads[len(places) :], strict=True))
    flat = [n for i in reversed(range(x.dim())) for n in (front[i], behind[i])]
    if mode == "constant":
        return F.pad(x, flat, value=value[0] if value else op.attribute("value", 0.0))
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    if mode not in ("reflect", "edge") or len(flat) // 2 > min(3, x.dim() - 1):
        raise NotTranslatedError(f"its border is made by {mode} along {len(flat) // 2} dimensions")
    return F.pad(x, flat, mode="reflect" if mode == "reflect" else "replicate")
