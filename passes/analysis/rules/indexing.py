"""Indexing: the indexed dim stays as it is, the others pass."""

from __future__ import annotations

import torch

from ....ir.axis import Conflict, Dims, total
from ..walk import Args, Multi, Walk, rule
from .joining import between

GATHERED = "gathered by index"


@rule("unbind")
def unbind(w: Walk, a: Args) -> Multi:
    dim = a.dim % len(a.self)
    w.freeze(a.self[dim], "unbind")
    return Multi([d for i, d in enumerate(a.self) if i != dim] for _ in w.node.meta["val"])


@rule("select")
def select(w: Walk, a: Args) -> Dims:
    dim = a.dim % len(a.self)
    w.freeze(a.self[dim], "select")
    return [d for i, d in enumerate(a.self) if i != dim]


@rule("embedding")
def embedding(w: Walk, a: Args) -> Dims:
    w.freeze(a.weight[0], "vocabulary")
    w.tag("produce", a.weight[1])
    return [*a.indices, a.weight[1]]


@rule("index", "_unsafe_index")
def index(w: Walk, a: Args) -> Dims:
    """x[i, :, j]: indexed dims freeze; the broadcast index lands at the first one, or in front when they are apart."""
    x, raw = a.self, a.raw("indices")
    at = [i for i, t in enumerate(raw) if t is not None]
    if any(raw[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in at):
        raise Conflict("a mask picks among its elements, as many as the values say")
    chosen = w.broadcast(*(a.indices[i] for i in at))
    for i in at:
        w.freeze(x[i], GATHERED)
    rest = [d for i, d in enumerate(x) if i not in at]
    where = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return [*rest[:where], *chosen, *rest[where:]]


@rule("index_select")
def index_select(w: Walk, a: Args) -> Dims:
    dim = a.dim % len(a.self)
    w.freeze(a.self[dim], GATHERED)
    return [*a.self[:dim], a.index[0] if a.index else (), *a.self[dim + 1 :]]


@rule("gather", "take_along_dim")
def gather(w: Walk, a: Args) -> Dims:
    x, chosen = a.self, list(a.get("index") or a.get("indices"))
    dim = a.dim % len(x)
    w.freeze([x[dim], chosen[dim]], GATHERED)
    for i, (p, q) in enumerate(zip(x, chosen, strict=True)):
        if i == dim:
            continue
        if total(p) == total(q):
            w.unify(p, q)
        else:
            w.freeze([p, q], GATHERED)
    return chosen


@rule("slice_scatter")
def slice_scatter(w: Walk, a: Args) -> Dims:
    """``self`` with a slice along one dim replaced by ``src``: a ``cat`` of what is before, ``src`` and the rest."""
    x, source, dim = a.self, a.src, a.dim % len(a.self)
    for i, (p, q) in enumerate(zip(x, source, strict=True)):
        if i != dim:
            w.unify(p, q)
    full, part, start = total(x[dim]), total(source[dim]), a.raw("start") or 0
    if full == part:
        w.unify(x[dim], source[dim])
        if a.raw("end") == full:
            w.literal("end", "sum", [x[dim]])
        return list(x)
    if w.symbolic(full) or w.symbolic(part) or not isinstance(start, int) or a.step != 1:
        w.freeze([x[dim], source[dim]], "part of it is overwritten")
        return list(x)
    start = max(start + full, 0) if start < 0 else start
    try:
        before, written = between(x[dim], start, start + part)
    except Conflict as conflict:
        w.conflict([x[dim], source[dim]], conflict)
        return list(x)
    w.unify(written, source[dim])
    w.literal("start", "sum", [before] if start else [])
    w.literal("end", "sum", [before, written] if start else [written])
    return list(x)


@rule("select_scatter")
def select_scatter(w: Walk, a: Args) -> Dims:
    """``self`` with one position along a dim replaced by ``src``."""
    dim = a.dim % len(a.self)
    w.freeze(a.self[dim], "part of it is overwritten")
    for p, q in zip([d for i, d in enumerate(a.self) if i != dim], a.src, strict=True):
        w.unify(p, q)
    return list(a.self)


@rule("index_put", "index_add", "index_copy", "scatter", "scatter_add", "masked_scatter")
def scatter(w: Walk, a: Args) -> Dims:
    for tensor in a.tensors():
        w.freeze(tensor, "scattered into")
    return w.fresh("scattered into")
