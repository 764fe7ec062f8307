"""What a convolution reads of its pictures: strides, padding and dilation, and the patches themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from .dataflow import bind


def unfold(node: Node, kernel: Sequence[int], x: Tensor) -> Tensor:
    """What a convolution with this kernel reads of its input x, one row per output position. [n, c * kernel]"""
    size = list(kernel)
    stride, pad, dilation = pads_of(node, len(size))
    if len(size) == 1:
        x, size = x[:, :, None], [1, *size]
        stride, pad, dilation = [1, *stride], [0, *pad], [1, *dilation]
    columns = functional.unfold(x, tuple(size), tuple(dilation), tuple(pad), tuple(stride))
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def pads_of(node: Node, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation of a convolution, one number per dimension of its pictures."""
    args = bind(node)
    stride, pad, dilation = (_list(args.get(k, d), dims) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return stride, pad, dilation


def _list(value: Any, length: int) -> list[int]:
    many = list(value) if isinstance(value, list | tuple) else [value]
    return many * length if len(many) == 1 else many
