"""Ops that PyTorch's ONNX exporter does not know, in the standard ones: add a function here, and a line to KNOWN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

_END = 2**63 - 1
_FLOAT, _INT64, _DOUBLE, _HALVES = 1, 7, 11, (10, 16)  # in onnx.proto


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``custom_translation_table``: those ops of ``KNOWN`` that are registered -> their translations.

    The exporter decomposes what it is given, so that ops appear which the graph does not call.
    """
    found = {}
    for name, translation in KNOWN.items():
        namespace, op, overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            found[getattr(packet, overload)] = translation
    return found


def _grouped_mm(input: Any, weight: Any, offs: Any) -> Any:
    """[rows, k], [experts, k, n], [experts] -> [rows, n]: rows up to the first offset meet the first expert, and so on;
    rows behind the last offset are zero. One MatMul per expert, on the rows that the router gave it: the
    multiply-accumulates are those of the rows, whatever the router decides.
    """
    from onnxscript import opset18 as op

    ends: Any = op.Cast(offs, to=_INT64)
    start, parts = _ints(0), list[Any]()
    for expert in range(int(weight.shape[0])):
        index: Any = op.Constant(value_int=expert)
        end: Any = op.Slice(ends, _ints(expert), _ints(expert + 1))
        one: Any = op.Gather(weight, index, axis=0)
        parts.append(op.MatMul(op.Slice(input, start, end, _ints(0)), one))
        start = end
    behind = op.MatMul(op.Slice(input, start, _ints(_END), _ints(0)), one)
    return op.Concat(*parts, op.Sub(behind, behind), axis=0)


def _sort_stable(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """(values, indices). ONNX's TopK is stable by its specification: of equal values the lower index comes first."""
    from onnxscript import opset18 as op

    size = op.Gather(op.Shape(self), _ints(dim))
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """x / sqrt(mean x^2 + eps) * weight in the words that ONNX Runtime fuses (SimplifiedLayerNormalization): with a
    division, not the product with a reciprocal that the exporter writes."""
    from onnxscript import opset18 as op

    axes, half = _ints(*range(-len(normalized_shape), 0)), int(input.dtype) in _HALVES
    wide = torch.float64 if int(input.dtype) == _DOUBLE else torch.float32
    least = torch.finfo(wide).eps if eps is None else eps
    x: Any = op.Cast(input, to=_FLOAT) if half else input  # squares leave the range of half precision
    two, small = (cast("Any", op.Constant(value_float=value)) for value in (2.0, float(least)))
    power: Any = op.ReduceMean(op.Pow(x, two), axes, keepdims=1)
    normed: Any = op.Div(x, op.Sqrt(op.Add(power, op.CastLike(small, power))))
    normed = op.CastLike(normed, input) if half else normed
    return normed if weight is None else op.Mul(normed, weight)


def _ints(*values: int) -> Any:
    from onnxscript import opset18 as op

    return op.Constant(value_ints=list(values))


KNOWN: Mapping[str, Callable[..., Any]] = {
    "transformers.grouped_mm_fallback.default": _grouped_mm,
    "aten.rms_norm.default": _rms_norm,
    "aten.sort.stable": _sort_stable,
}
