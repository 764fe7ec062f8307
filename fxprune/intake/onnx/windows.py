"""How windows lie on a picture: strides, borders, what ``auto_pad`` means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .table import Op


@dataclass(frozen=True)
class Windows:
    """Sizes per dimension of the picture: of a window, its steps, its holes, and the border in front and behind."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    front: tuple[Any, ...]
    behind: tuple[Any, ...]

    @property
    def even(self) -> bool:
        """Whether the border is as wide in front as behind."""
        return self.front == self.behind


def windows(op: Op, x: Tensor, kernel: Sequence[int]) -> Windows:
    """The windows of a convolution or a pooling over ``x``: [batch, channels, *picture]."""
    rank = len(kernel)
    strides = tuple(op.attribute("strides", (1,) * rank))
    dilations = tuple(op.attribute("dilations", (1,) * rank))
    pads, auto = tuple(op.attribute("pads", (0,) * 2 * rank)), op.attribute("auto_pad", "NOTSET")
    front, behind = pads[:rank], pads[rank:]
    if auto == "VALID":
        front = behind = (0,) * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        whole = [
            max(0, (-(-size // step) - 1) * step + (width - 1) * hole + 1 - size)
            if isinstance(size, int)
            else (width - 1) * hole + 1 - step
            for size, width, step, hole in zip(x.shape[2:], kernel, strides, dilations, strict=True)
        ]
        less, more = tuple(n // 2 for n in whole), tuple(n - n // 2 for n in whole)
        front, behind = (less, more) if auto == "SAME_UPPER" else (more, less)
    return Windows(tuple(kernel), strides, dilations, front, behind)


def put_border(x: Tensor, given: Windows, value: float = 0.0) -> Tensor:
    """``x`` with the border put around it."""
    pads = [n for pair in zip(reversed(given.front), reversed(given.behind), strict=True) for n in pair]
    return F.pad(x, pads, value=value)
