"""Reductions: sums contract, means and variances are statistics, everything else freezes what it reduces."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....ir.axis import Conflict, Dims, total
from ..walk import Args, Multi, Walk, rule


def positions(x: Dims, dim: Any) -> list[int]:
    """Dimension arguments as sorted non-negative positions; None or [] means all."""
    if dim is None or dim == []:
        return list(range(len(x)))
    return sorted({d % len(x) for d in (dim if isinstance(dim, list | tuple) else [dim])})


def _reduce(w: Walk, a: Args, x: Dims, gone: list[int]) -> Any:
    keep = bool(a.get("keepdim", False))
    out = [() if i in gone else d for i, d in enumerate(x) if keep or i not in gone]
    value = w.node.meta["val"]
    return out if isinstance(value, Tensor) else Multi([list(out) for _ in value])


@rule("sum", "nansum", "linalg_vector_norm", "norm", "frobenius_norm")
def add_up(w: Walk, a: Args) -> Any:
    """A zeroed element adds nothing to a sum or a p-norm (p > 0; the others freeze)."""
    x, gone = a.self, positions(a.self, a.get("dim"))
    order = a.get("ord", a.get("p"))
    if isinstance(order, int | float) and not 0 < order < float("inf"):
        return other(w, a)
    for i in gone:
        w.contract(x[i], ("self", i))
    return _reduce(w, a, x, gone)


@rule("mean", "var", "std", "var_mean", "std_mean")
def average(w: Walk, a: Args) -> Any:
    x, gone = a.self, positions(a.self, a.get("dim"))
    for i in gone:
        w.statistic(x[i], i)
    return _reduce(w, a, x, gone)


@rule(
    "max",
    "min",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "any",
    "all",
    "prod",
    "logsumexp",
    "median",
    "mode",
    "count_nonzero",
    "aminmax",
)
def other(w: Walk, a: Args) -> Any:
    if isinstance(a.get("other"), list):  # max(x, y) is element-wise
        return w.broadcast(*a.tensors())
    x, gone = a.self, positions(a.self, a.get("dim"))
    for i in gone:
        w.freeze(x[i], f"{w.node.target}")
    return _reduce(w, a, x, gone)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "sort", "argsort", "msort")
def keep_order(w: Walk, a: Args) -> Any:
    x, dim = a.self, a.get("dim", a.get("dims", 0))
    for i in positions(x, dim):
        w.freeze(x[i], f"{w.node.target}")
    value = w.node.meta["val"]
    return list(x) if isinstance(value, Tensor) else Multi([list(x) for _ in value])


@rule("tril", "triu", "diagonal", "diag_embed", "trace")
def triangular(w: Walk, a: Args) -> Any:
    if w.node.target._schema.name.removeprefix("aten::") not in ("tril", "triu"):  # type: ignore[union-attr]
        raise Conflict("a diagonal is taken of it")
    w.freeze(a.self[-2:], "triangle")
    return list(a.self)


@rule("topk")
def topk(w: Walk, a: Args) -> Multi:
    x, dim = a.self, a.dim % len(a.self)
    w.freeze(x[dim], "topk")
    chosen = w.fresh()[0][dim]
    w.freeze(chosen, "topk")
    return Multi([[chosen if i == dim else d for i, d in enumerate(x)] for _ in range(2)])


@rule("linalg_norm")
def linalg_norm(w: Walk, a: Args) -> Any:
    """A vector norm where one dim and a number (or nothing) are given; matrix norms stay closed."""
    one = a.dim is not None and (isinstance(a.dim, int) or len(a.dim) == 1)
    return add_up(w, a) if one and not isinstance(a.get("ord"), str) else similarity(w, a)


@rule("cosine_similarity")
def cosine(w: Walk, a: Args) -> Dims:
    """sum(x y) / (|x| |y|): zeros add nothing to any of the three sums, on either side"""
    rank = max(len(a.x1), len(a.x2))
    dim = a.dim % rank
    for name, x in (("x1", a.x1), ("x2", a.x2)):
        if len(x) != rank or total(x[dim]) == 1:
            raise Conflict("a cosine similarity of vectors of different lengths")
        w.contract(x[dim], (name, dim))
    both = w.broadcast(a.x1, a.x2)
    return [*both[:dim], *both[dim + 1 :]]


@rule("cdist")
def similarity(w: Walk, a: Args) -> Any:
    if any(total(d) > 1 for t in a.tensors() for d in t):
        raise Conflict("fxprune knows no rule for this reduction")
    return w.fresh()
