"""Element-wise ops and copies: dims that meet are the same elements."""

from __future__ import annotations

from ....ir.axis import Dims
from ....ir.dataflow import ELEMENTWISE, ops_in
from ..walk import Args, Multi, Walk, rule


@rule("pointwise", *ops_in(*ELEMENTWISE))  # and, by themselves, all that torch tags so
def pointwise(w: Walk, a: Args) -> Dims:
    return w.broadcast(*a.tensors())


@rule("broadcast_tensors")
def broadcast_tensors(w: Walk, a: Args) -> Multi:
    out = w.broadcast(*a.tensors())
    return Multi(list(out) for _ in a.tensors())


@rule(
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "native_dropout",
    "to",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "lift_fresh",
    "_to_copy",
    "type_as",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
)
def like_first(w: Walk, a: Args) -> Dims:
    """Copies and casts: the shape of the first tensor; a second one only lends its dtype."""
    return list(a.tensors()[0])


@rule("glu")
def glu(w: Walk, a: Args) -> Dims:
    """The two halves of ``dim`` meet element-wise; the op finds the middle by itself."""
    from ....ir.axis import cut, total

    x, dim = a.self, a.dim % len(a.self)
    left, right = cut(x[dim], total(x[dim]) // 2)
    w.unify(left, right)
    return [*x[:dim], left, *x[dim + 1 :]]


@rule("prelu")
def prelu(w: Walk, a: Args) -> Dims:
    if len(a.self) > 1 and a.weight[0]:
        w.unify(a.self[1], a.weight[0])
    return a.self
