"""Element by element: arithmetic, comparisons, conversions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..graph import DTYPES
from ..table import NotTranslatedError, Op, translates

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Erf": torch.erf, "Not": torch.logical_not, "IsNaN": torch.isnan, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b,
    "Equal": lambda a, b: a == b, "Less": lambda a, b: a < b, "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b, "GreaterOrEqual": lambda a, b: a >= b,
}  # fmt: skip
_LOGICAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor, "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip
for _name, _do in {**_UNARY, **_LOGICAL}.items():
    translates(_name)(lambda op, *inputs, do=_do: do(*inputs))
for _name, _two in _BINARY.items():
    translates(_name, numbers=True)(lambda op, a, b, do=_two: do(a, b))


@translates("Identity")
def identity(op: Op, x: Tensor) -> Tensor:
    return x


@translates("Dropout")
def dropout(op: Op, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    """In evaluation form it is its input; the mask says that all stays."""
    return (x, torch.ones_like(x, dtype=torch.bool)) if op.gives(1) else x


@translates("Div", numbers=True)
def div(op: Op, a: Any, b: Any) -> Tensor:
    whole = not any(t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, float) for t in (a, b))
    if whole:
        return torch.div(a, b, rounding_mode="trunc")
    return a / b


@translates("Pow", numbers=True)
def power(op: Op, a: Any, b: Any) -> Tensor:
    dtype = a.dtype if isinstance(a, Tensor) else b.dtype
    return torch.pow(a, b).to(dtype)


@translates("Mod", numbers=True)
def mod(op: Op, a: Any, b: Any) -> Tensor:
    return torch.fmod(a, b) if op.flag("fmod") else torch.remainder(a, b)


@translates("Max")
def maximum(op: Op, *inputs: Tensor) -> Tensor:
    return reduce(torch.maximum, inputs)


@translates("Min")
def minimum(op: Op, *inputs: Tensor) -> Tensor:
    return reduce(torch.minimum, inputs)


@translates("Sum")
def total(op: Op, *inputs: Tensor) -> Tensor:
    return reduce(operator.add, inputs)


@translates("Mean")
def mean(op: Op, *inputs: Tensor) -> Tensor:
    return total(op, *inputs) / len(inputs)


@translates("Clip", numbers=True)
def clip(op: Op, x: Tensor, least: Any = None, most: Any = None) -> Tensor:
    least, most = op.attribute("min", least), op.attribute("max", most)
    if least is None and most is None:
        return x
    return torch.clamp(x, least, most)


@translates("Where")
def where(op: Op, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@translates("IsInf")
def is_inf(op: Op, x: Tensor) -> Tensor:
    up, down = op.flag("detect_positive", True), op.flag("detect_negative", True)
    return torch.isinf(x) if up and down else torch.isposinf(x) if up else torch.isneginf(x)


@translates("Cast")
def cast(op: Op, x: Tensor) -> Tensor:
    dtype = DTYPES.get(op.attribute("to"))
    if dtype is None:
        raise NotTranslatedError(f"it converts to the type of number {op.attribute('to')}")
    return x.to(torch.float64 if op.wide and dtype.is_floating_point else dtype)


@translates("CastLike")
def cast_like(op: Op, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)
