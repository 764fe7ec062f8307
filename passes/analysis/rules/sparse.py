"""Layers whose weight is stored as tiles: what they mix cannot be cut any more, what passes beside it can."""

from __future__ import annotations

from ....ir.axis import Dims, new_dim
from ..walk import Args, Walk, rule


@rule("fxprune::block_sparse_linear")
def block_sparse_linear(w: Walk, a: Args) -> Dims:
    """y[.., o] = act(sum over the tiles of row o of x[.., tile] W[tile])"""
    x, tiles, why = a.x, a.tiles, "its weight is stored as tiles"
    w.freeze([x[-1], *tiles, *a.offsets, *a.columns, *(a.bias or [])], why)
    out = new_dim(w.shape()[-1])
    w.freeze(out, why)
    w.matmul(x[:-1], tiles[0], tiles[2], tiles[1], "linear")
    return [*x[:-1], out]
