"""Matrix products: the contracted axis is where removing an element and masking it agree."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence

from torch.fx import Node

from ....ir.axes import Literal
from ....ir.axis import Axis, Conflict, Dim, Dims, leaves, total
from ....ir.dataflow import bind, op_name
from ..routing import GROUPED, OFFSETS, Routing, routing_of
from ..walk import Args, Walk, rule


@rule("linear")
def linear(w: Walk, a: Args) -> Dims:
    """y[.., o] = x[.., i] W[o, i] + b[o]"""
    x, weight, bias = a.input, a.weight, a.bias
    if len(weight) == 1:
        raise Conflict("a linear layer whose weight is one vector")
    w.unify(x[-1], weight[1])
    w.contract(weight[1], ("input", len(x) - 1), ("weight", 1))
    if bias is not None:
        w.unify(bias[0], weight[0])
    w.tag("produce", weight[0])
    w.matmul(x[:-1], (), weight[1], weight[0], "linear")
    return [*x[:-1], weight[0]]


@rule("addmm")
def addmm(w: Walk, a: Args) -> Dims:
    """y[m, n] = x[m, k] W[k, n] + b, broadcast"""
    x, weight = a.mat1, a.mat2
    w.unify(x[1], weight[0])
    w.contract(weight[0], ("mat1", 1), ("mat2", 0))
    w.tag("produce", weight[1])
    w.matmul([], x[0], weight[0], weight[1], "linear")
    return w.broadcast([x[0], weight[1]], a.self)


@rule("matmul", "mm", "bmm", "baddbmm", "dot", "mv")
def matmul(w: Walk, a: Args) -> Dims:
    """y[batch, m, n] = x[batch, m, k] y[batch, k, n]; batch dims broadcast; vectors gain a unit dim and lose it."""
    names = [n for n in ("self", "batch1", "mat2", "other", "batch2", "vec", "tensor") if isinstance(a.get(n), list)]
    left, right = names[-2:] if a.get("batch1") is None else ["batch1", "batch2"]
    x, y = a.get(left), a.get(right)
    rows, columns = len(x) > 1, len(y) > 1
    m, n = x[-2] if rows else (), y[-1] if columns else ()
    k_at = len(y) - 2 if columns else 0
    w.unify(x[-1], y[k_at])
    w.contract(x[-1], (left, len(x) - 1), (right, k_at))
    batch = w.broadcast(x[:-2], y[:-2])
    w.matmul(batch, m, x[-1], n, "linear" if w.is_weight(a.raw(left)) or w.is_weight(a.raw(right)) else "matmul")
    if n:
        w.tag("produce", n)
    out = [*batch, *([m] if rows else []), *([n] if columns else [])]
    return w.broadcast(out, a.self) if a.get("batch1") is not None else out


@rule("inner")
def inner(w: Walk, a: Args) -> Dims:
    """y[.., ...] = x[.., k] z[..., k]"""
    x, y = a.self, a.other
    if not x or not y:
        return w.broadcast(x, y)
    return _pairs(w, a, [len(x) - 1], [len(y) - 1])


@rule("tensordot")
def tensordot(w: Walk, a: Args) -> Dims:
    """Contracts ``dims_self[i]`` of one with ``dims_other[i]`` of the other; what is left stands side by side."""
    return _pairs(w, a, [d % len(a.self) for d in a.dims_self], [d % len(a.other) for d in a.dims_other])


def _pairs(w: Walk, a: Args, here: list[int], there: list[int]) -> Dims:
    x, y, k = a.self, a.other, list[Axis]()
    for i, j in zip(here, there, strict=True):
        if total(x[i]) != total(y[j]):
            raise Conflict("a product whose sides have different sizes where they are summed")
        w.unify(x[i], y[j])
        w.contract(x[i], ("self", i), ("other", j))
        k += x[i]
    m, n = [d for i, d in enumerate(x) if i not in here], [d for j, d in enumerate(y) if j not in there]
    weight = w.is_weight(a.raw("self")) or w.is_weight(a.raw("other"))
    w.matmul(m, (), tuple(k), tuple(axis for d in n for axis in d), "linear" if weight else "matmul")
    for d in n:
        w.tag("produce", d)
    return [*m, *n]


@rule("addmv")
def addmv(w: Walk, a: Args) -> Dims:
    """y[m] = x[m, k] v[k] + b[m]"""
    x, vector = a.mat, a.vec
    w.unify(x[1], vector[0])
    w.contract(x[1], ("mat", 1), ("vec", 0))
    w.matmul([], x[0], x[1], (), "linear" if w.is_weight(a.raw("mat")) else "matmul")
    return w.broadcast([x[0]], a.self)


@rule("outer", "ger")
def outer(w: Walk, a: Args) -> Dims:
    """y[i, j] = x[i] y[j]: nothing is summed"""
    return [a.self[0], a.vec2[0]]


@rule("einsum")
def einsum(w: Walk, a: Args) -> Dims:
    """Letters name dims; letters missing on the right are contracted. ``...`` becomes letters of its own."""
    terms, right = _letters(a.equation.replace(" ", ""), [len(x) for x in a.tensors()])
    at: dict[str, Dim] = {}
    for term, x in zip(terms, a.tensors(), strict=True):
        if len(set(term)) != len(term):
            raise Conflict("an einsum that takes a diagonal")
        for letter, dim in zip(term, x, strict=True):
            if total(at.setdefault(letter, dim)) == 1:
                at[letter] = dim
            elif total(dim) != 1:
                w.unify(at[letter], dim)
    for letter, dim in at.items():
        if letter not in right:
            w.contract(dim, *((f"tensors.{i}", t.index(letter)) for i, t in enumerate(terms) if letter in t))
    operands = [(t, w.is_weight(raw)) for t, raw in zip(terms, a.raw("tensors"), strict=True)]
    path = list(a.get("path") or ())
    while len(operands) > 1:
        i, j = sorted((path.pop(0), path.pop(0)) if path else (0, 1))
        (two, weight), (one, other) = operands.pop(j), operands.pop(i)
        kept = {*right, *(c for term, _ in operands for c in term)}
        _product(w, at, one, two, kept, "linear" if weight or other else "matmul")
        operands.append(("".join(c for c in dict.fromkeys(one + two) if c in kept), weight and other))
    return [at[c] for c in right]


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """One letter per dim of every operand and of the result, with ``...`` spelled out and ``->`` made up."""
    left, arrow, right = equation.partition("->")
    terms, spare = left.split(","), [c for c in string.ascii_letters if c not in equation]
    extra = max(n - len(t.replace("...", "")) if "..." in t else 0 for t, n in zip(terms, ranks, strict=True))
    more = "".join(spare[:extra])
    if not arrow:
        once = sorted(c for c in left.replace(",", "").replace(".", "") if left.count(c) == 1)
        right = "..." * ("..." in left) + "".join(once)
    last = [max(extra - (n - len(t) + 3), 0) for t, n in zip(terms, ranks, strict=True)]  # fewer dims are the last ones
    return [t.replace("...", more[i:]) for t, i in zip(terms, last, strict=True)], right.replace("...", more)


def _product(w: Walk, at: Mapping[str, Dim], one: str, two: str, kept: Collection[str], form: str) -> None:
    """Two operands of an einsum: letters that only one of them has and nobody keeps are summed before."""
    both = [c for c in one if c in two]
    m, n = ([c for c in mine if c in kept and c not in other] for mine, other in ((one, two), (two, one)))
    inner = tuple(axis for c in both if c not in kept for axis in at[c])
    if inner:  # without any it is an element-wise product
        outer = [tuple(axis for c in letters for axis in at[c]) for letters in (m, n)]
        w.matmul([at[c] for c in both if c in kept], outer[0], inner, outer[1], form)
    for c in n:
        w.tag("produce", at[c])


@rule(*GROUPED)
def grouped_mm(w: Walk, a: Args) -> Dims:
    """Each row of x[tok, k] meets the expert's W[E, k, n]; the offsets index the experts.

    Where they come from scores over the experts by a choice of the largest (``routing_of``), experts may go: a choice
    among fewer is the choice in which the others score minus infinity.
    """
    x, weight, *rest = a.tensors()
    if len(x) != 2 or len(weight) != 3:
        raise Conflict("a grouped product of tensors with so many dimensions")
    names = [n for n in ("self", "input", "mat2", "weight") if isinstance(a.get(n), list)]
    w.unify(x[1], weight[1])
    w.contract(weight[1], (names[0], 1), (names[1], 1))
    w.tag("produce", weight[2])
    w.tag("expert", weight[0])
    given = next((a.raw(name) for name in OFFSETS if isinstance(a.raw(name), Node)), None)
    routing = routing_of(given)
    if routing is None or any(bind(table)["self"] not in w.dims for table in routing.tables):
        w.freeze(weight[0], "expert: it cannot be told what sends rows to it")
        for offsets in rest:
            w.freeze(offsets, "expert offsets")
    else:
        _join_routing(w, routing, weight[0])
    w.matmul([x[0]], (), weight[1], weight[2], "linear")
    return [x[0], weight[2]]


def _join_routing(w: Walk, routing: Routing, experts: Dim) -> None:
    """The experts' dim is that of the scores, of the counts, and of the offsets."""
    scores, counts, offsets = (w.dims[n] for n in (routing.scores, routing.counted, routing.offsets))
    looked_up = [(table, w.dims[bind(table)["self"]]) for table in routing.tables]
    of_each = [dims[-1] if op_name(table) == "gather" else dims[0] for table, dims in looked_up]
    for dim in (scores[-1], counts[0], offsets[0], *of_each):
        w.unify(dim, experts)
    if not any(name == routing.top.name for _, name in w.tags["routed"]):
        w.tags["routed"].append((experts, routing.top.name))
        w.tags["minus-infinity"].append((experts, routing.masked.name))
        w.literals.append(Literal(routing.counted.name, "bins", "sum", (experts,)))
        w.literals.append(Literal(routing.counted.name, "max", "last", (experts,)))
    here = set(leaves(experts))
    w.frozen = [f for f in w.frozen if f.node not in routing.nodes or not here & set(leaves(f.dim))]
