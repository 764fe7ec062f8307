"""Reshapes and reorderings: where axes come apart and together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ....ir.axis import Axis, Conflict, Dim, Dims, atoms, new_dim, split, total
from ..walk import Args, Walk, rule
from .reduce import positions


def regroup(w: Walk, x: Dims, want: list[int]) -> Dims:
    """The one reshape: cut both shapes into minimal blocks of equal product, refine inside each block.

    Minimal blocks matter: a spatial conflict (8x7 seen as 28x2) must not take the channels beside it along.
    """
    out: Dims = []
    for i, i_end, j, j_end in _blocks([total(d) for d in x], want):
        try:
            out += _refine(tuple(a for d in x[i:i_end] for a in d), want[j:j_end])
        except Conflict as conflict:
            why = w.conflict(x[i:i_end], conflict)
            fresh = [new_dim(size) for size in want[j:j_end]]
            w.freeze(fresh, why)
            out += fresh
    return out


def _blocks(have: list[int], want: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(start, end) in ``have`` and in ``want`` of minimal blocks of equal product.

    Open sizes need not factor (``n`` seen as ``n//2`` pairs): one block then holds all but what is equal at either end.
    """
    i = j = 0
    while i < len(have) or j < len(want):
        i_end, j_end, p, q = i, j, 1, 1
        if i < len(have):
            p, i_end = have[i], i + 1
        if j < len(want):
            q, j_end = want[j], j + 1
        while p != q:
            if p < q and i_end < len(have):
                p, i_end = p * have[i_end], i_end + 1
            elif p > q and j_end < len(want):
                q, j_end = q * want[j_end], j_end + 1
            else:
                i_end, j_end = len(have), len(want)
                while i_end > i and j_end > j and have[i_end - 1] == want[j_end - 1]:
                    i_end, j_end = i_end - 1, j_end - 1
                break
        yield i, i_end, j, j_end
        i, j = i_end, j_end


def _refine(dim: Dim, sizes: list[int]) -> Dims:
    """``dim`` as a list of dims of the given sizes, splitting atoms where a boundary falls inside one."""
    block, out = list(atoms(dim)), []
    if total(dim) != math.prod(sizes):
        raise Conflict(f"{total(dim)} elements are viewed as {' x '.join(map(str, sizes))}")
    for size in sizes:
        taken: list[Axis] = []
        have = 1
        while have < size:
            axis = block[0]
            if size % (have * axis.size) == 0:
                taken.append(axis)
                have *= axis.size
                block.pop(0)
            else:
                if size % have:
                    raise Conflict(f"rows of {have} elements are viewed in rows of {size}, which run across them")
                split(axis, size // have)
                block = list(atoms(tuple(block)))
        out.append(tuple(taken))
    return out


@rule("reshape", "view", "_unsafe_view", "_reshape_alias")
def reshape(w: Walk, a: Args) -> Dims:
    out = regroup(w, a.self, w.shape())
    name = "shape" if a.raw("shape") is not None else "size"
    if isinstance(a.raw(name), list | tuple):
        w.literal(name, "shape", out)
    return out


@rule("flatten", "view_as", "reshape_as", "ravel")
def flatten(w: Walk, a: Args) -> Dims:
    return regroup(w, a.self, w.shape())


@rule("unflatten")
def unflatten(w: Walk, a: Args) -> Dims:
    out, at = regroup(w, a.self, w.shape()), a.dim % len(a.self)
    w.literal("sizes", "shape", out[at : at + len(a.raw("sizes"))])
    return out


@rule("permute")
def permute(w: Walk, a: Args) -> Dims:
    return [a.self[d] for d in a.dims]


@rule("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint", "matrix_H")
def transpose(w: Walk, a: Args) -> Dims:
    x = list(a.self)
    if "numpy_T" in str(w.node.target):
        return x[::-1]
    if len(x) > 1:
        i, j = a.get("dim0", a.get("axis0", -2)), a.get("dim1", a.get("axis1", -1))
        x[i], x[j] = x[j], x[i]
    return x


@rule("movedim", "moveaxis")
def movedim(w: Walk, a: Args) -> Dims:
    x = list(a.self)
    sources = a.source if isinstance(a.source, list) else [a.source]
    targets = a.destination if isinstance(a.destination, list) else [a.destination]
    moved = {t % len(x): s % len(x) for s, t in zip(sources, targets, strict=True)}
    rest = iter(i for i in range(len(x)) if i not in moved.values())
    return [x[moved[i] if i in moved else next(rest)] for i in range(len(x))]


@rule("view_as_complex")
def view_as_complex(w: Walk, a: Args) -> Dims:
    w.freeze(a.self[-1], "real and imaginary part")
    return list(a.self[:-1])


@rule("view_as_real")
def view_as_real(w: Walk, a: Args) -> Dims:
    parts = new_dim(2)
    w.freeze(parts, "real and imaginary part")
    return [*a.self, parts]


@rule("atleast_1d", "atleast_2d", "atleast_3d")
def atleast(w: Walk, a: Args) -> Dims:
    (x,) = a.tensors()
    if len(x) != len(w.shape()):
        raise Conflict("dimensions of size 1 are added")
    return list(x)


@rule("unsqueeze")
def unsqueeze(w: Walk, a: Args) -> Dims:
    x = list(a.self)
    x.insert(a.dim % (len(x) + 1), ())
    return x


@rule("squeeze")
def squeeze(w: Walk, a: Args) -> Dims:
    gone = positions(a.self, a.get("dim"))
    return [d for i, d in enumerate(a.self) if i not in gone or total(d) != 1]


@rule("expand", "expand_as", "broadcast_to")
def expand(w: Walk, a: Args) -> Dims:
    """A unit dim becomes n copies: a new axis that shrinks with what it later meets."""
    want = w.shape()
    x = [()] * (len(want) - len(a.self)) + list(a.self)
    out = [d if total(d) == size else new_dim(size) for d, size in zip(x, want, strict=True)]
    for before, after in zip(x, out, strict=True):
        if before is not after:
            w.tag("repeat", after)
    if isinstance(a.get("other"), list):
        for d, e in zip(out, a.other, strict=True):
            w.unify(d, e)
    else:
        w.literal("size", "shape", out)
    return out


@rule("repeat", "tile")
def repeat(w: Walk, a: Args) -> Dims:
    want, name = w.shape(), "repeats" if a.get("repeats") is not None else "dims"
    x = [()] * (len(want) - len(a.self)) + list(a.self)
    copies = [new_dim(size // total(d)) for size, d in zip(want, x, strict=True)]
    for copy in copies:
        w.tag("repeat", copy)
    w.literal(name, "shape", copies[len(copies) - len(a.raw(name)) :])
    return [copy + d for copy, d in zip(copies, x, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(w: Walk, a: Args) -> Dims:
    if not isinstance(a.raw("repeats"), int) or a.raw("dim") is None:
        raise Conflict("elements are repeated as often as a tensor says, or flattened")
    x, dim, copies = list(a.self), a.dim % len(a.self), new_dim(a.repeats)
    w.tag("repeat", copies)
    w.literal("repeats", "sum", [copies])
    if isinstance(a.raw("output_size"), int):
        w.literal("output_size", "sum", [x[dim] + copies])
    x[dim] = x[dim] + copies
    return x


@rule("roll")
def roll(w: Walk, a: Args) -> Dims:
    for i in positions(a.self, a.dims):
        w.freeze(a.self[i], "roll")
    return list(a.self)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "replication_pad1d")
def pad(w: Walk, a: Args) -> Dims:
    """Only padded dims are touched; a cut axis may not be padded."""
    x, out, want = a.tensors()[0], list(a.tensors()[0]), w.shape()
    amounts = a.raw("pad") if a.raw("pad") is not None else a.raw("padding")
    for i in range(len(amounts) // 2):
        if amounts[2 * i] != 0 or amounts[2 * i + 1] != 0:
            out[-1 - i] = new_dim(want[-1 - i])
            w.freeze([x[-1 - i], out[-1 - i]], "padded")
    return out


@rule("unfold")
def unfold(w: Walk, a: Args) -> Dims:
    """Tensor.unfold: sliding windows of one dim, laid out in a new last dim."""
    x, out, at = a.self, w.fresh(), a.dimension % len(a.self)
    w.freeze([x[at], out[at], out[-1]], "sliding window")
    return [*x[:at], out[at], *x[at + 1 :], out[-1]]
