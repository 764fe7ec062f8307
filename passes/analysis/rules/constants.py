"""Tensors made from nothing. Constant fills may shrink; values that depend on position may not."""

from __future__ import annotations

from typing import Any

from ....ir.axis import Dims
from ..walk import Args, Walk, rule


@rule("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty")
def fill(w: Walk, a: Args) -> Dims:
    out: Dims = w.fresh()
    w.literal("size", "shape", out)
    return out


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "scalar_tensor",
    "tensor",
    "triu_indices",
    "tril_indices",
    "rand",
    "randn",
    "randint",
    "hann_window",
    "meshgrid",
)
def positional(w: Walk, a: Args) -> Any:
    return w.fresh("values depend on position")


@rule("histc", "bincount")
def histogram(w: Walk, a: Args) -> Any:
    w.freeze(a.tensors(), "histogram")
    return w.fresh("histogram bins")
