"""Windows of a picture: their average, their largest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import NotTranslatedError, Op, translates
from ..windows import Windows, put_border, windows

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LARGEST = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@translates("MaxPool")
def max_pool(op: Op, x: Tensor) -> Tensor:
    lie = _windows(op, x)
    if op.gives(1):
        raise NotTranslatedError("it also gives the places of the largest")
    pads = lie.front
    if not lie.even or any(2 * pad > width for pad, width in zip(pads, lie.kernel, strict=True)):
        x, pads = put_border(x, lie, -math.inf), (0,) * len(pads)
    whole = op.flag("ceil_mode")
    return _LARGEST[len(lie.kernel)](x, lie.kernel, lie.strides, pads, lie.dilations, ceil_mode=whole)


@translates("AveragePool")
def average_pool(op: Op, x: Tensor) -> Tensor:
    lie = _windows(op, x)
    if any(hole != 1 for hole in lie.dilations):
        raise NotTranslatedError("its windows have holes")
    run, whole, counted = _AVERAGE[len(lie.kernel)], op.flag("ceil_mode"), op.flag("count_include_pad")
    narrow = all(2 * pad <= width for pad, width in zip(lie.front, lie.kernel, strict=True))
    if lie.even and narrow:
        return run(x, lie.kernel, lie.strides, lie.front, ceil_mode=whole, count_include_pad=counted)
    average = run(put_border(x, lie), lie.kernel, lie.strides, 0, ceil_mode=whole)
    if counted:
        return average
    inside = run(put_border(torch.ones_like(x[:1, :1]), lie), lie.kernel, lie.strides, 0, ceil_mode=whole)
    return average / inside


@translates("GlobalAveragePool")
def global_average_pool(op: Op, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() != 4 else F.adaptive_avg_pool2d(x, 1)


@translates("GlobalMaxPool")
def global_max_pool(op: Op, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def _windows(op: Op, x: Tensor) -> Windows:
    lie = windows(op, x, op.attribute("kernel_shape"))
    if len(lie.kernel) not in _LARGEST:
        raise NotTranslatedError(f"its windows have {len(lie.kernel)} dimensions")
    return lie
