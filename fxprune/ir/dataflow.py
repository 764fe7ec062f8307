"""Where a layer's output goes: through moves, scales and sums into a residual stream, and the norm that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

LINEAR = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
}
"""Ops that multiply by a weight -> argument names of input, weight and bias."""
CONVOLUTION = ("conv1d", "conv2d", "convolution", "_convolution")
MOVES = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "dropout",
    "roll",
    "slice",
    "narrow",
    "to",
    "_to_copy",
    "type_as",
}
"""Ops that only move, drop or copy elements (dropout in evaluation form)."""


def goes_to(node: Node, bound: Mapping[str, str]) -> tuple[tuple[str, ...], str, str, float]:
    """(path, target, norm, eps): follow the output through moves, scales and sums while nothing else reads it.

    target   the last sum before anything else reads the value; path: the nodes from the output to it
    norm     ``variance`` (layer norm), ``power`` (RMS norm) or "": how the norm that reads the target sees a row
    bound    placeholder -> name of the parameter or buffer it stands for
    """
    path: list[str] = []
    current, target, summed = node, node, 0
    while len(current.users) == 1:
        user = next(iter(current.users))
        name = op_name(user)
        if user.op != "call_function" or not _passes(user, name, current, bound):
            break
        path.append(user.name)
        current = user
        if name in ("add", "sub"):
            target, summed = current, len(path)
    norm, eps = norm_after(target)
    return tuple(path[:summed]), target.name, norm, eps


def row_weight(norm: str, eps: float, z: Tensor) -> Tensor:
    """1 / (what the norm divides by)^2 per row of z: errors that the norm shrinks count less. [.., 1], or [] without"""
    wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if norm == "variance":
        return 1 / (wide.var(-1, keepdim=True, unbiased=False) + eps).clamp_min(1e-12)
    if norm == "power":
        return 1 / (wide.square().mean(-1, keepdim=True) + eps).clamp_min(1e-12)
    return wide.new_ones(())


def unfolded(node: Node, kernel: Sequence[int], x: Tensor) -> Tensor:
    """What a convolution with this kernel reads of its input x, one row per output position. [n, c * kernel]"""
    args, size = bind(node), list(kernel)
    stride, pad, dilation = (
        _list(args.get(k, d), len(size)) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    if len(size) == 1:
        x, size = x[:, :, None], [1, *size]
        stride, pad, dilation = [1, *stride], [0, *pad], [1, *dilation]
    columns = functional.unfold(x, tuple(size), tuple(dilation), tuple(pad), tuple(stride))
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _list(value: Any, length: int) -> list[int]:
    many = list(value) if isinstance(value, list | tuple) else [value]
    return many * length if len(many) == 1 else many


def _passes(user: Node, name: str, source: Node, bound: Mapping[str, str]) -> bool:
    """True for ops that give every element its own place, scaled and shifted by what does not depend on it."""
    if name in MOVES:
        return user.args[0] is source
    if name in ("add", "sub"):
        return True
    if name == "mul":  # a layer scale; a gate made of activations would be no constant
        others = [a for a in user.args if a is not source]
        return len(others) == 1 and (not isinstance(others[0], Node) or _constant(others[0], bound))
    if "batch_norm" in name:
        args = bind(user)
        return args.get("input") is source and not args.get("training", False)
    return False


def _constant(node: Node, bound: Mapping[str, str]) -> bool:
    while node.op == "call_function" and op_name(node) in MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.name in bound


def norm_after(node: Node, depth: int = 3) -> tuple[str, float]:
    """How the norm that reads ``node`` sees its rows: by their variance, by their power, or not at all; and its eps."""
    width = node.meta["val"].shape[-1] if isinstance(node.meta.get("val"), Tensor) else None
    for user in node.users:
        name, args = op_name(user), bind(user) if user.op == "call_function" else {}
        if name in ("layer_norm", "native_layer_norm") and len(args.get("normalized_shape", ())) == 1:
            return "variance", float(args.get("eps") or 0.0)
        if name in ("rms_norm", "_fused_rms_norm") and len(args.get("normalized_shape", ())) == 1:
            return "power", float(args.get("eps") or 0.0)
        if name == "pow" and user.args[1] == 2 and any(op_name(u) == "mean" for u in user.users):
            return "power", 0.0
    for user in node.users if depth else ():
        value = user.meta.get("val")
        if op_name(user) in MOVES and isinstance(value, Tensor) and value.dim() and value.shape[-1] == width:
            norm, eps = norm_after(user, depth - 1)
            if norm:
                return norm, eps
    return "", 0.0


def op_name(node: Node) -> str:
    """``linear`` for aten.linear.default."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return getattr(node.target, "__name__", str(node.target))


def bind(node: Node) -> dict[str, Any]:
    """Schema argument name -> argument, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    bound = {}
    for i, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else default)
    return bound
