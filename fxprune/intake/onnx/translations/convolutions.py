"""Convolutions, of one to three dimensions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..table import NotTranslatedError, Op, translates
from ..windows import put_border, windows

_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BACKWARD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@translates("Conv")
def conv(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    lie = windows(op, x, weight.shape[2:])
    run = _FORWARD.get(len(lie.kernel))
    if run is None:
        raise NotTranslatedError(f"its windows have {len(lie.kernel)} dimensions")
    pads = lie.front
    if not lie.even:
        x, pads = put_border(x, lie), (0,) * len(pads)
    return run(x, weight, bias, lie.strides, pads, lie.dilations, op.attribute("group", 1))


@translates("ConvTranspose")
def conv_transpose(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    run = _BACKWARD.get(rank)
    if run is None:
        raise NotTranslatedError(f"its windows have {rank} dimensions")
    strides = tuple(op.attribute("strides", (1,) * rank))
    dilations = tuple(op.attribute("dilations", (1,) * rank))
    more = tuple(op.attribute("output_padding", (0,) * rank))
    pads, auto = tuple(op.attribute("pads", (0,) * 2 * rank)), op.attribute("auto_pad", "NOTSET")
    asked = op.attribute("output_shape")
    if asked is not None or auto.startswith("SAME"):
        sizes = [
            (size - 1) * step + more[i] + (weight.shape[2 + i] - 1) * dilations[i] + 1
            for i, (size, step) in enumerate(zip(x.shape[2:], strides, strict=True))
        ]
        wanted = asked or [size * step for size, step in zip(x.shape[2:], strides, strict=True)]
        cut = [size - want for size, want in zip(sizes, wanted, strict=True)]
        half = [n // 2 for n in cut]
        rest = [n - h for n, h in zip(cut, half, strict=True)]
        pads = (*half, *rest) if auto == "SAME_UPPER" else (*rest, *half)
    front, behind = pads[:rank], pads[rank:]
    groups = op.attribute("group", 1)
    if front == behind:
        return run(x, weight, bias, strides, front, more, groups, dilations)
    whole = run(x, weight, bias, strides, 0, more, groups, dilations)
    for i in range(rank):
        whole = whole.narrow(2 + i, front[i], whole.shape[2 + i] - front[i] - behind[i])
    return whole
