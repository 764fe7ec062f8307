"""Attention: the fused op, and the softmax that marks the explicit form."""

from __future__ import annotations

from ....ir.axis import Dims, new_dim, total
from ..walk import Args, Walk, rule


@rule("scaled_dot_product_attention")
def attention(w: Walk, a: Args) -> Dims:
    """softmax(q k^T * scale + mask) v for q[.., L, E], k[.., S, E], v[.., S, Ev]

    The default scale is E ** -0.5: when E shrinks it is written out at its dense value. With ``enable_gqa`` the query
    heads are KV groups times queries per group.
    """
    q, k, v, mask = a.query, a.key, a.value, a.attn_mask
    if a.enable_gqa and total(q[-3]) != total(k[-3]):
        repeats = new_dim(total(q[-3]) // total(k[-3]))
        w.tag("repeat", repeats)
        w.unify(k[-3], v[-3])
        w.unify(q[-3], k[-3] + repeats)
        batch = [*w.broadcast(q[:-3], k[:-3], v[:-3]), q[-3]]
    else:
        batch = w.broadcast(q[:-2], k[:-2], v[:-2])
    w.unify(q[-1], k[-1])
    w.unify(k[-2], v[-2])
    if mask is not None:
        w.broadcast([*batch, q[-2], k[-2]], mask)
    w.contract(q[-1], ("query", len(q) - 1), ("key", len(k) - 1))
    w.freeze(k[-2], "softmax over keys")
    w.tag("softmax", k[-2])
    w.tag("produce", v[-1])
    w.matmul(batch, q[-2], q[-1], k[-2])
    w.matmul(batch, q[-2], k[-2], v[-1])
    if a.raw("scale") is None:
        w.literal("scale", "scale", [q[-1]])
    return [*batch, q[-2], v[-1]]


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(w: Walk, a: Args) -> Dims:
    x = a.self
    w.freeze(x[a.dim], "softmax")
    w.tag("softmax", x[a.dim])
    for i, dim in enumerate(x):
        if i != a.dim % len(x):
            w.tag("softmax-beside", dim)
    return list(x)
