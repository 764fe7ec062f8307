"""The ops that fxprune inserts where tokens become fewer: heads are averaged, widths contracted or passed through."""

from __future__ import annotations

from typing import Any

from ....ir.axis import Dim, Dims, new_dim, total
from ....ops.library import OPS
from ..walk import Args, Multi, Walk, rule

WIDTHS = (("x", 2), ("metric", 2), ("attention", 1))
"""(argument, dimension) of the axes that an op's products may be as wide as."""


@rule(
    "fxprune::merge_tokens",
    "fxprune::prune_tokens",
    "fxprune::adapt_tokens",
    "fxprune::transform_tokens",
    "fxprune::pagerank_tokens",
    "fxprune::drop_tokens",
    "fxprune::remove_token",
)
def reduced(w: Walk, a: Args) -> Multi:
    """(x' [b, fewer, d], size' [b, fewer, 1], place [b, tokens]) of x [b, tokens, d] and what speaks of its tokens."""
    x = a.x
    fewer = w.fresh()[0][1]
    w.freeze([x[1], fewer], "tokens are reduced")
    for name in ("metric", "score", "size"):
        other = a.get(name)
        if other is not None:
            w.unify(x[0], other[0])
            w.unify(x[1], other[1])
    if a.get("metric") is not None:
        w.contract(a.metric[2], ("metric", 2))
    if a.get("attention") is not None:
        w.unify(x[0], a.attention[0])
        w.freeze(a.attention[2:], "tokens are reduced")
        w.statistic(a.attention[1], 1, "attention")
    _products(w, a)
    return Multi([[x[0], fewer, x[2]], [x[0], fewer, ()], [x[0], x[1]]])


@rule("fxprune::attention_map")
def attention_map(w: Walk, a: Args) -> Dims:
    """softmax(q k^T) [b, h, rows, tokens] of q, k [b, h, tokens, e]; all rows, or the first ones alone"""
    batch = w.broadcast(a.query[:2], a.key[:2])
    w.unify(a.query[3], a.key[3])
    w.contract(a.query[3], ("query", 3), ("key", 3))
    w.freeze([a.query[2], a.key[2]], "softmax over keys")
    rows = a.query[2] if a.rows == 0 else new_dim(a.rows)
    w.freeze(rows, "softmax over keys")
    w.matmul(batch, rows, a.query[3], a.key[2])
    return [*batch, rows, a.key[2]]


@rule("fxprune::token_score")
def token_score(w: Walk, a: Args) -> Dims:
    """A number per token of attention [b, h, rows, tokens] (mean over heads) and values [b, h, tokens, e] (norm)"""
    w.freeze([*a.attention[2:], a.value[2]], "scores of tokens")
    w.statistic(a.attention[1], 1, "attention")
    w.contract(a.value[1], ("value", 1))
    w.contract(a.value[3], ("value", 3))
    w.unify(a.attention[0], a.value[0])
    return [a.attention[0], a.attention[3]]


@rule("fxprune::restore_tokens")
def restore(w: Walk, a: Args) -> Dims:
    """x[place]: [b, tokens, d] of x [b, fewer, d] and place [b, tokens]"""
    w.unify(a.x[0], a.place[0])
    w.freeze([a.x[1], a.place[1]], "gathered by index")
    return [a.x[0], a.place[1], a.x[2]]


def _products(w: Walk, a: Args) -> None:
    """The products inside the op, each with the axis that it is as wide as: its cost is ``macs`` at that width."""
    op = OPS[w.node.target._schema.name]  # type: ignore[union-attr]
    given: dict[str, Any] = {}
    for argument in w.node.target._schema.arguments:  # type: ignore[union-attr]
        value = a.get(argument.name)
        given[argument.name] = tuple(total(d) for d in value) if isinstance(value, list) else value

    def macs(wide: str = "") -> int:
        """With one of the widths 1 and the others 0."""
        at = dict(given)
        for name, position in WIDTHS:
            if at.get(name) is not None:
                shape = list(at[name])
                shape[position] = int(name == wide)
                at[name] = tuple(shape)
        return op.macs(**at)

    rest = macs()
    _one(w, a.x[0], rest, ())
    for name, position in WIDTHS:
        if given.get(name) is not None:
            _one(w, a.x[0], macs(name) - rest, a.get(name)[position])


def _one(w: Walk, batch: Dim, count: int, width: Dim) -> None:
    if count:
        w.matmul([batch], new_dim(count), width, ())
