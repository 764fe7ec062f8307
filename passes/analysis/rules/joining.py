"""Joining and splitting along a dim: sums of dims."""

from __future__ import annotations

from ....ir.axis import Axis, Conflict, Dim, Dims, cut, new_dim, pieces, sum_dim, total
from ..walk import Args, Multi, Walk, rule


@rule("cat", "concat", "concatenate")
def cat(w: Walk, a: Args) -> Dims:
    return _join(w, a, a.dim)


@rule("hstack", "vstack", "row_stack", "column_stack", "dstack")
def stack_along(w: Walk, a: Args) -> Dims:
    """``cat`` along a dim that the name says, where no tensor has too few dims for it."""
    name, ranks = w.node.target._schema.name.removeprefix("aten::"), {len(t) for t in a.tensors()}  # type: ignore[union-attr]
    dim = 2 if name == "dstack" else 0 if name in ("vstack", "row_stack") or ranks == {1} else 1
    if min(ranks) < (1 if name == "hstack" else max(dim + 1, 2)):
        raise Conflict(f"{name} of tensors with {sorted(ranks)} dims")
    return _join(w, a, dim)


def _join(w: Walk, a: Args, dim: int) -> Dims:
    tensors = [t for t in a.tensors() if len(t) > 0 and t != [(Axis,)]]
    dim = dim % len(tensors[0])
    tensors = [t for t in tensors if len(t) == len(tensors[0])]  # torch lets an empty 1-D tensor join anything
    out = list(tensors[0])
    for other in tensors[1:]:
        for i, (p, q) in enumerate(zip(out, other, strict=True)):
            if i != dim and total(p) != 1:
                w.unify(p, q)
    out[dim] = sum_dim([t[dim] for t in tensors])
    return out


@rule("stack")
def stack(w: Walk, a: Args) -> Dims:
    """The new axis is a sum of n unit dims: it cannot shrink, and meets the ``n`` of a later view."""
    out = w.broadcast(*a.tensors())
    axis = Axis(len(a.tensors()))
    axis.segments = [()] * axis.size
    out.insert(a.dim % (len(out) + 1), (axis,) if axis.size != 1 else ())
    return out


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit")
def split(w: Walk, a: Args) -> Multi:
    x, dim = a.self, a.get("dim", 0) % len(a.self)
    sizes = [w.size(v.shape[dim]) for v in w.node.meta["val"]]
    if any(map(w.symbolic, sizes)):
        parts = [new_dim(size) for size in sizes]
        w.freeze([x[dim], *parts], "split of an open size")
        return Multi([*x[:dim], part, *x[dim + 1 :]] for part in parts)
    parts = pieces(x[dim], sizes)
    if len(parts) > 1:
        w.literal("", "split", parts)
    return Multi([*x[:dim], part, *x[dim + 1 :]] for part in parts)


@rule("slice", "narrow", "slice_copy")
def slice_(w: Walk, a: Args) -> Dims:
    x, dim, step = a.self, a.get("dim", 0) % len(a.self), a.get("step", 1)
    full, got = total(x[dim]), w.shape()[dim]
    narrow = a.raw("length") is not None

    def frozen(why: str) -> Dims:
        out = new_dim(got)
        w.freeze([x[dim], out], why)
        return [*x[:dim], out, *x[dim + 1 :]]

    if full == got:
        if narrow:
            w.literal("length", "sum", [x[dim]])
        elif a.raw("end") == full:
            w.literal("end", "sum", [x[dim]])
        return list(x)
    if w.symbolic(full) or w.symbolic(got):
        return frozen("slice of an open size")
    start = a.raw("start") or 0
    if not isinstance(start, int):
        return frozen("slice at an offset that depends on a size")
    if got == 0:  # full rotary width leaves nothing to pass through: still nothing when the axis shrinks
        return [*x[:dim], new_dim(0), *x[dim + 1 :]]
    start = max(start + full, 0) if start < 0 else start
    try:
        if step > 1:
            return _take_strided(w, a, x, dim, full, got, start, step)
        before, kept = between(x[dim], start, start + got)
    except Conflict as conflict:
        return frozen(w.conflict([x[dim]], conflict))
    w.literal("start", "sum", [before] if start else [])
    if narrow:
        w.literal("length", "sum", [kept])
    else:
        w.literal("end", "sum", [before, kept] if start else [kept])
    return [*x[:dim], kept, *x[dim + 1 :]]


def between(dim: Dim, start: int, end: int) -> tuple[Dim, Dim]:
    """``dim`` before ``start``, and from ``start`` to ``end``."""
    before: Dim = ()
    if end < total(dim):
        dim, _ = cut(dim, end)
    if start > 0:
        before, dim = cut(dim, start)
    return before, dim


def _take_strided(w: Walk, a: Args, x: Dims, dim: int, full: int, got: int, start: int, step: int) -> Dims:
    """x[..., i::step] of (n, step) is n: interleaved rotary embeddings."""
    if full % step or start >= step or got != full // step or a.raw("length") is not None:
        raise Conflict("every so many elements are taken, beginning or ending within a row")
    lanes = Axis(step)
    lanes.segments = [()] * step
    outer = new_dim(got)
    w.unify(x[dim], (*outer, lanes))
    if a.raw("end") == full:
        w.literal("end", "sum", [x[dim]])
    return [*x[:dim], outer, *x[dim + 1 :]]
