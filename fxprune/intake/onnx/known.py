"""Numbers that are known while the graph is read: constants, sizes, and what is computed from them.

Exporters spell shapes out as graphs of their own (``Shape``, ``Gather``, ``Concat``, ``Reshape``). Here that arithmetic
is done in Python, where an open size stays a symbol, so that no op of it is left in the program.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .graph import DTYPES
from .table import Op

FEW = 64
"""Whole numbers that a constant of sizes holds at most; more are a table."""


@dataclass(frozen=True)
class Known:
    """An array of numbers, open sizes (``torch.SymInt``) among them, and its dtype in the file."""

    values: np.ndarray
    dtype: torch.dtype

    @property
    def is_open(self) -> bool:
        """Whether an open size is among the numbers."""
        return any(not isinstance(v, bool | int | float) for v in self.values.flat)

    def numbers(self) -> tuple[Any, ...]:
        """All of them, flat."""
        return tuple(self.values.flat)

    def tensor(self) -> Tensor:
        """The same as a tensor."""
        if not self.is_open:
            return torch.tensor(self.values.tolist(), dtype=self.dtype).reshape(self.values.shape)
        parts = [torch.scalar_tensor(v, dtype=self.dtype) for v in self.values.flat]
        return parts[0] if not self.values.ndim else torch.stack(parts).reshape(self.values.shape)


def as_known(values: Any, dtype: torch.dtype) -> Known:
    """``values``, in lists or an array or alone, as :class:`Known` of this dtype."""
    array = np.array(values, dtype=object)
    kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int
    plain = [kind(v) if kind is bool or isinstance(v, int | float | np.generic) else v for v in array.flat]
    return Known(_shape_items(plain, array.shape), dtype)


def _shape_items(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Items, symbols among them, as an array; numpy would look into them if it were asked to make one."""
    out = np.empty(shape, dtype=object)
    for place, item in enumerate(items):
        out.flat[place] = item
    return out


def of_tensor(tensor: Tensor) -> Known:
    """A constant."""
    return as_known(tensor.tolist(), tensor.dtype)


Hosted = Callable[..., "Known | None"]
HOSTED: dict[str, Hosted] = {}
"""Op -> the same on numbers that are known: None where it had better be a tensor."""


def _hosts(name: str) -> Callable[[Hosted], Hosted]:
    def add(run: Hosted) -> Hosted:
        HOSTED[name] = run
        return run

    return add


def _elementwise(name: str, do: Callable[..., Any], gives: torch.dtype | None = None) -> None:
    def run(op: Op, *inputs: Known) -> Known:
        arrays = np.broadcast_arrays(*(i.values for i in inputs))
        made = [do(*items) for items in zip(*(a.flat for a in arrays), strict=True)]
        return as_known(_shape_items(made, arrays[0].shape), gives or inputs[0].dtype)

    HOSTED[name] = run


def _divide(a: Any, b: Any) -> Any:
    """ONNX's division of whole numbers drops the fraction; sizes are never negative."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    return a // b if not (isinstance(a, int) and isinstance(b, int)) or a * b >= 0 else -(-a // b)


def _floor(a: Any) -> Any:
    return a if isinstance(a, torch.SymInt | torch.SymFloat) else float(math.floor(a))


def _ceil(a: Any) -> Any:
    return a if isinstance(a, torch.SymInt | torch.SymFloat) else float(math.ceil(a))


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _divide, "Pow": operator.pow,
    "Neg": operator.neg, "Abs": abs, "Max": lambda *a: functools.reduce(torch.sym_max, a),
    "Min": lambda *a: functools.reduce(torch.sym_min, a), "Floor": _floor, "Ceil": _ceil, "Sqrt": torch.sym_sqrt,
}  # fmt: skip
_TRUTH: dict[str, Callable[..., Any]] = {
    "Equal": operator.eq, "Less": operator.lt, "LessOrEqual": operator.le, "Greater": operator.gt,
    "GreaterOrEqual": operator.ge, "And": lambda a, b: bool(a) and bool(b), "Or": lambda a, b: bool(a) or bool(b),
    "Not": operator.not_,
}  # fmt: skip
for _name, _do in _ARITHMETIC.items():
    _elementwise(_name, _do)
for _name, _do in _TRUTH.items():
    _elementwise(_name, _do, torch.bool)


@_hosts("Mod")
def _mod(op: Op, a: Known, b: Known) -> Known | None:
    if a.is_open or b.is_open or op.flag("fmod"):
        return None
    return as_known(np.mod(a.values, b.values), a.dtype)


@_hosts("Where")
def _where(op: Op, condition: Known, a: Known, b: Known) -> Known:
    return as_known(np.where(condition.values.astype(bool), a.values, b.values), a.dtype)


@_hosts("Cast")
def _cast(op: Op, a: Known) -> Known | None:
    dtype = DTYPES.get(op.attribute("to"))
    if dtype is None:
        return None
    whole = not dtype.is_floating_point and dtype is not torch.bool
    made = [int(v) if whole and isinstance(v, float) else v for v in a.values.flat]
    return as_known(_shape_items(made, a.values.shape), dtype)


@_hosts("Shape")
def _shape(op: Op, a: Known) -> Known:
    first, last, _ = slice(op.attribute("start", 0), op.attribute("end")).indices(a.values.ndim)
    return as_known(list(a.values.shape[first:last]), torch.int64)


@_hosts("Reshape")
def _reshape(op: Op, a: Known, shape: Known) -> Known:
    sizes = [a.values.shape[i] if n == 0 and not op.flag("allowzero") else n for i, n in enumerate(shape.numbers())]
    return Known(a.values.reshape(sizes), a.dtype)


@_hosts("Flatten")
def _flatten(op: Op, a: Known) -> Known:
    first = math.prod(a.values.shape[: op.attribute("axis", 1)])
    return Known(a.values.reshape(first, -1), a.dtype)


@_hosts("Transpose")
def _transpose(op: Op, a: Known) -> Known:
    return Known(a.values.transpose(op.attribute("perm")), a.dtype)


@_hosts("Concat")
def _concat(op: Op, *parts: Known) -> Known:
    return Known(np.concatenate([p.values for p in parts], op.attribute("axis")), parts[0].dtype)


@_hosts("Unsqueeze")
def _unsqueeze(op: Op, a: Known, axes: Known | None = None) -> Known:
    places = op.attribute("axes") if axes is None else axes.numbers()
    return Known(np.expand_dims(a.values, tuple(int(p) for p in places)), a.dtype)


@_hosts("Squeeze")
def _squeeze(op: Op, a: Known, axes: Known | None = None) -> Known:
    places = op.attribute("axes") if axes is None else axes.numbers()
    return Known(np.array(a.values.squeeze(None if places is None else tuple(places)), dtype=object), a.dtype)


@_hosts("Gather")
def _gather(op: Op, a: Known, index: Known) -> Known | None:
    if index.is_open:
        return None
    picked = np.take(a.values, index.values.astype(np.int64), axis=op.attribute("axis", 0))
    return as_known(picked, a.dtype)


@_hosts("Slice")
def _slice(op: Op, a: Known, *rest: Known) -> Known | None:
    said = [op.attribute(n) for n in ("starts", "ends", "axes", "steps")]
    begins, ends, axes, steps = [r.numbers() for r in rest] + said[len(rest) :]
    cut = [slice(None)] * a.values.ndim
    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        step = steps[i] if steps else 1
        if not all(isinstance(n, int) for n in (begin, end, step)):
            return None
        end = None if step < 0 and end < -a.values.shape[axes[i] if axes else i] else end
        cut[axes[i] if axes else i] = slice(begin, end, step)
    return Known(a.values[tuple(cut)], a.dtype)


@_hosts("Split")
def _split(op: Op, a: Known, sizes: Known | None = None) -> Any:
    axis, asked = op.attribute("axis", 0), op.attribute("split") if sizes is None else sizes.numbers()
    count = len(asked) if asked else op.outputs
    places = np.cumsum(asked)[:-1] if asked else count
    return tuple(Known(part, a.dtype) for part in np.split(a.values, places, axis))


@_hosts("Tile")
def _tile(op: Op, a: Known, repeats: Known) -> Known | None:
    return None if repeats.is_open else Known(np.tile(a.values, repeats.numbers()), a.dtype)


@_hosts("Expand")
def _expand(op: Op, a: Known, shape: Known) -> Known | None:
    if shape.is_open or len(shape.numbers()) > 1:
        return None
    return Known(np.broadcast_to(a.values, np.broadcast_shapes(a.values.shape, shape.numbers())), a.dtype)


@_hosts("ConstantOfShape")
def _constant_of_shape(op: Op, shape: Known) -> Known | None:
    sizes, value = shape.numbers(), op.attribute("value")
    if shape.is_open or len(sizes) > 1 or math.prod(sizes) > FEW:
        return None
    dtype = torch.float32 if value is None else value.dtype
    return as_known(np.full(sizes, 0 if value is None else value.item(), dtype=object), dtype)


def _reduced(name: str, do: Callable[[Sequence[Any]], Any]) -> None:
    def run(op: Op, a: Known, axes: Known | None = None) -> Known | None:
        places = op.attribute("axes") if axes is None else axes.numbers()
        if a.values.ndim != 1 or (places and tuple(places) not in ((0,), (-1,))) or not a.values.size:
            return None
        found = do(list(a.values.flat))
        return as_known([found] if op.flag("keepdims", True) else found, a.dtype)

    HOSTED[name] = run


_reduced("ReduceProd", lambda items: math.prod(items))
_reduced("ReduceSum", lambda items: sum(items[1:], items[0]))
_reduced("ReduceMax", lambda items: max(items))
_reduced("ReduceMin", lambda items: min(items))
