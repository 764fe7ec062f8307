"""Pictures at other sizes, and channels that become pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import NotTranslatedError, Op, translates

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@translates("Resize", known=(1, 2, 3))
def resize(
    op: Op,
    x: Tensor,
    region: tuple[Any, ...] | None = None,
    scales: tuple[Any, ...] | None = None,
    sizes: tuple[Any, ...] | None = None,
) -> Tensor:
    axes = op.attribute("axes")
    if axes is not None:
        own = dict(zip((a % x.dim() for a in axes), sizes or scales or (), strict=True))
        sizes = tuple(own.get(i, n) for i, n in enumerate(x.shape)) if sizes else None
        scales = tuple(own.get(i, 1.0) for i in range(x.dim())) if not sizes else None
    if op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NotTranslatedError("it keeps the ratio of the sides")
    return _resample(op, x, op.attribute("mode", "nearest"), scales or None, sizes or None)


@translates("Upsample", known=(1,))
def upsample(op: Op, x: Tensor, scales: tuple[Any, ...] | None = None) -> Tensor:
    return _resample(op, x, op.attribute("mode", "nearest"), scales or op.attribute("scales"), None)


def _resample(op: Op, x: Tensor, mode: str, scales: Sequence[Any] | None, sizes: Sequence[Any] | None) -> Tensor:
    where = op.attribute("coordinate_transformation_mode", "half_pixel")
    if op.node.op == "Upsample":
        where = "asymmetric"
    changed = [
        i for i in range(x.dim()) if (not _same(sizes[i], x.shape[i]) if sizes else not _same((scales or ())[i], 1))
    ]
    if not changed:
        return x
    by = None if scales is None else [float(s) if isinstance(s, int | float) else s for s in scales]
    if min(changed) >= 2 and x.dim() in _LINEAR:
        how = _as_torch(op, mode, where, x, by, sizes)
        if how is not None:
            name, corners = how
            wanted = None if by is not None else list(sizes or ())[2:]
            factor = None if by is None else by[2:]
            return F.interpolate(
                x, wanted, factor, name, corners, recompute_scale_factor=None, antialias=op.flag("antialias")
            )
    if op.flag("antialias"):
        raise NotTranslatedError(f"it smooths while it resizes by {mode}, {where}")
    for axis in changed:
        x = _along(op, x, axis, mode, where, None if by is None else by[axis], None if sizes is None else sizes[axis])
    return x


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are one, open ones by their symbols."""
    return bool(a == b)


def _as_torch(
    op: Op, mode: str, where: str, x: Tensor, scales: Sequence[Any] | None, sizes: Sequence[Any] | None
) -> tuple[str, bool | None] | None:
    """(torch's mode, whether corners stay) where torch samples at the same places."""
    whole = _whole(x, scales, sizes)
    if mode == "nearest":
        rounding = op.attribute("nearest_mode", "round_prefer_floor") if op.node.op == "Resize" else "floor"
        same = where == "asymmetric" and rounding == "floor"
        middle = whole and where in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")
        return ("nearest", None) if same or middle else None
    if mode in ("linear", "cubic"):
        name = _LINEAR[x.dim()] if mode == "linear" else "bicubic"
        cubic = mode == "linear" or (x.dim() == 4 and op.attribute("cubic_coeff_a", -0.75) == -0.75)
        if not cubic or op.flag("exclude_outside"):
            return None
        if where == "align_corners":
            return name, True
        return (name, False) if where in ("half_pixel", "pytorch_half_pixel") else None
    return None


def _whole(x: Tensor, scales: Sequence[Any] | None, sizes: Sequence[Any] | None) -> bool:
    """Whether every size grows by a whole number."""
    if scales is not None:
        return all(isinstance(s, float) and s >= 1 and s == int(s) for s in scales[2:])
    pairs = zip((sizes or ())[2:], x.shape[2:], strict=True)
    return all(isinstance(a, int) and isinstance(b, int) and a >= b and a % b == 0 for a, b in pairs)


def _along(op: Op, x: Tensor, axis: int, mode: str, where: str, scale: Any, size: Any) -> Tensor:
    """``x`` resized along one dimension, at the places that the file says, whatever torch does."""
    have = x.shape[axis]
    if not isinstance(have, int) or not isinstance(size if scale is None else scale, int | float):
        raise NotTranslatedError(f"it resizes an open size by {mode}, {where}, at places where torch does not sample")
    want = math.floor(have * scale) if scale is not None else int(size)
    factor = float(scale) if scale is not None else want / have
    places = [_source(where, i, factor, want, have) for i in range(want)]
    if mode == "nearest":
        rounding = op.attribute("nearest_mode", "round_prefer_floor") if op.node.op == "Resize" else "floor"
        picked = [min(max(_round_place(p, rounding), 0), have - 1) for p in places]
        return x.index_select(axis, torch.tensor(picked))
    if mode != "linear":
        raise NotTranslatedError(f"it resizes by {mode}, {where}")
    inside = [min(max(p, 0.0), have - 1.0) for p in places]
    low = [min(math.floor(p), have - 1) for p in inside]
    high = [min(n + 1, have - 1) for n in low]
    share = torch.tensor([p - n for p, n in zip(inside, low, strict=True)], dtype=x.dtype)
    share = share.reshape(-1, *(1,) * (x.dim() - 1 - axis))
    return x.index_select(axis, torch.tensor(low)) * (1 - share) + x.index_select(axis, torch.tensor(high)) * share


def _source(where: str, i: int, factor: float, want: int, have: int) -> float:
    """Where element ``i`` of the result lies in the input, rounded as onnxruntime's fp32 is: at an edge it decides."""
    if where in ("half_pixel", "pytorch_half_pixel"):
        single = float(np.float32(i + 0.5) / np.float32(factor) - np.float32(0.5))
        return 0.0 if where.startswith("pytorch") and want == 1 else single
    if where == "align_corners":
        return i * (have - 1) / (want - 1) if want > 1 else 0.0
    if where == "asymmetric":
        return float(np.float32(i) / np.float32(factor))
    if where == "half_pixel_symmetric":
        adjusted = want / (factor * have)
        return have / 2 * (1 - adjusted) + (i + 0.5) / factor - 0.5
    raise NotTranslatedError(f"it samples at places called {where}")


def _round_place(place: float, how: str) -> int:
    if how == "floor":
        return math.floor(place)
    if how == "ceil":
        return math.ceil(place)
    return math.ceil(place - 0.5) if how == "round_prefer_floor" else math.floor(place + 0.5)


@translates("DepthToSpace")
def depth_to_space(op: Op, x: Tensor) -> Tensor:
    side, (batch, channels, height, width) = op.attribute("blocksize"), x.shape
    if op.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, side)
    parts = x.reshape(batch, side, side, channels // side**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // side**2, height * side, width * side)


@translates("SpaceToDepth")
def space_to_depth(op: Op, x: Tensor) -> Tensor:
    side, (batch, channels, height, width) = op.attribute("blocksize"), x.shape
    parts = x.reshape(batch, channels, height // side, side, width // side, side).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * side**2, height // side, width // side)


@translates("GridSample")
def grid_sample(op: Op, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        op.attribute("mode", "linear"), op.attribute("mode", "linear")
    )
    border = op.attribute("padding_mode", "zeros")
    return F.grid_sample(x, grid, mode, border, op.flag("align_corners"))
