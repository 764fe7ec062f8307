"""Axes: every tensor dimension is a product (or a sum) of axes, and pruning shrinks an axis.

An :class:`Axis` is ``size`` interchangeable elements and a union-find node. It is an *atom* until something
refines it, and then exactly one of

* a **product** ``parts = (a1, a2, ...)``, outer first, made by ``reshape``; its size is the product of theirs;
* a **sum** ``segments = [D1, D2, ...]`` of dims laid end to end, made by ``cat``, ``split``, ``slice``.

A :data:`Dim` is a tuple of axes read as a product, outer first. A dim of size 1 is the empty product ``()``, so
broadcasting, ``keepdim`` and 1x1 kernels need no special case. A tensor is a list of dims.

Everything reads through :func:`find`, so a later refinement reaches every earlier use: one forward walk over a graph
is enough. Never keep the result of :func:`atoms` as if it were final; keep the dim and expand it on use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor


class Conflict(Exception):
    """Two views of one axis have no common refinement. The caller freezes the axes involved: never guess."""


class Axis:
    """``size`` interchangeable elements; see the module docstring. ``label`` is only a name for people."""

    __slots__ = ("label", "parent", "parts", "segments", "size")

    def __init__(self, size: int, label: str = "") -> None:
        self.size = size
        self.label = label
        self.parent: Axis = self
        self.parts: Dim | None = None
        self.segments: list[Dim] | None = None

    def __repr__(self) -> str:
        return f"{self.label or 'axis'}:{self.size}"


OPEN = 1_000_000
"""A size above this stands for an open one, see ``fxprune.ir.sizes``."""

Dim = tuple[Axis, ...]
Dims = list[Dim]
Count = TypeVar("Count", int, int | Fraction)
DEEP = 40  # unifications inside one another: what real models do takes three
Keep = Mapping[Axis, Tensor]  # a leaf axis -> the sorted indices that stay (1-D int64)


def new_dim(size: int, label: str = "") -> Dim:
    """A fresh dim of ``size`` elements; ``()`` for size 1."""
    return (Axis(size, label),) if size != 1 else ()


def sum_dim(segments: list[Dim], label: str = "") -> Dim:
    """The dim made by laying ``segments`` end to end; empty ones vanish, one alone is itself, and sums lie flat (a loop
    that joins piece by piece does not nest)."""
    present = [part for s in segments if total(s) > 0 for part in _flat(s)]
    if len(present) == 1:
        return present[0]
    axis = Axis(sum(map(total, present)), label)
    axis.segments = present
    return (axis,)


def _flat(dim: Dim) -> list[Dim]:
    whole = atoms(dim)
    return whole[0].segments if len(whole) == 1 and whole[0].segments is not None else [dim]


def find(axis: Axis) -> Axis:
    """The representative of ``axis``'s class (with path halving)."""
    while axis.parent is not axis:
        axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def atoms(dim: Dim) -> Dim:
    """``dim`` with products flattened and unit axes dropped; sums stay whole."""
    out: list[Axis] = []
    for axis in map(find, dim):
        if axis.parts is not None:
            out += atoms(axis.parts)
        elif axis.size != 1:
            out.append(axis)
    return tuple(out)


def leaves(dim: Dim) -> Iterator[Axis]:
    """The unrefined axes that ``dim`` is made of, looking into sums as well. An axis may come more than once."""
    for axis in atoms(dim):
        if axis.segments is not None:
            for segment in axis.segments:
                yield from leaves(segment)
        else:
            yield axis


def leaves_of(dims: Any) -> Iterator[Axis]:
    """Leaf axes of a value's dims, or of several values'."""
    for one in dims if isinstance(dims, list) else ():
        yield from leaves(one) if isinstance(one, tuple) else leaves_of(one)


def total(dim: Dim) -> int:
    """Number of elements of ``dim``."""
    return math.prod(find(axis).size for axis in dim)


# ---------------------------------------------------------------- refinement


def split(axis: Axis, outer: int) -> None:
    """Refine ``axis`` into ``outer x (size / outer)`` in place.

    On a sum this is the distributive law ``x1*I + x2*I = (x1 + x2)*I``: the inner factor of every segment is unified.
    This one rule reads fused qkv biases (``cat(q, k, v).view(3, H, d)``), Phi-3's ``(H + 2KV) x d``, channel shuffle.
    """
    axis = find(axis)
    inner, rest = divmod(axis.size, outer)
    if rest:
        raise Conflict(f"{axis.size} elements are viewed as {outer} equal parts, which they do not make")
    if axis.segments is None:
        axis.parts = new_dim(outer) + new_dim(inner)
        return
    if any(total(s) % inner for s in axis.segments):
        sizes = " and ".join(str(total(s)) for s in axis.segments)
        raise Conflict(f"{sizes} elements are joined, and then viewed in rows of {inner} that run across the seam")
    shared, joined = new_dim(inner), Axis(outer)
    pieces: list[Dim] = []
    for segment in axis.segments:
        piece = new_dim(total(segment) // inner)
        unify(segment, piece + shared)
        pieces.append(piece)
    joined.segments = pieces
    axis.segments, axis.parts = None, (joined, *shared)


def cut(dim: Dim, offset: int) -> tuple[Dim, Dim]:
    """Split ``dim`` at element ``offset`` into (left, right); its outermost atom becomes a sum.

    Requires ``offset`` to be a multiple of the inner atoms: ``(a1 + a2)*R = a1*R + a2*R``.
    """
    parts = atoms(dim)
    inner = total(parts[1:])
    if not parts or offset % inner:
        whole = " x ".join(str(a.size) for a in parts)
        raise Conflict(f"{whole} elements are cut at {offset}, in the middle of a row")
    axis, offset = parts[0], offset // inner
    if axis.segments is None:
        axis.segments = [new_dim(offset), new_dim(axis.size - offset)]
    position = index = 0
    while index < len(axis.segments) and position < offset:
        segment = axis.segments[index]
        if position + total(segment) > offset:
            axis.segments[index : index + 1] = cut(segment, offset - position)
            segment = axis.segments[index]
        position += total(segment)
        index += 1
    left, right = sum_dim(axis.segments[:index]), sum_dim(axis.segments[index:])
    return left + parts[1:], right + parts[1:]


def pieces(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """``dim`` as consecutive pieces of these sizes."""
    ends = list(itertools.accumulate(sizes))
    for end in ends[:-1]:  # from the whole each time: pieces cut off a rest would nest as deep as there are
        cut(dim, end)
    left = [cut(dim, end)[0] if end < total(dim) else dim for end in ends]
    return [cut(part, end - size)[1] if end > size else part for part, end, size in zip(left, ends, sizes, strict=True)]


def _merge(a: Axis, b: Axis, depth: int) -> None:
    """Join two axes of equal size. A sum absorbs an atom; two sums are cut to a common refinement first."""
    if depth > DEEP:  # x[1:] meets x[:-1]: every element would be one with its neighbour, one by one
        raise Conflict("its elements meet their own neighbours (the same axis, shifted)")
    if a.segments is None:
        a, b = b, a
    if a.segments is not None and b.segments is not None:
        xs, ys, out = list(a.segments), list(b.segments), []
        while xs:
            x, y = xs.pop(0), ys.pop(0)
            if total(x) > total(y):
                x, rest = cut(x, total(y))
                xs.insert(0, rest)
            elif total(y) > total(x):
                y, rest = cut(y, total(x))
                ys.insert(0, rest)
            unify(x, y, depth + 1)
            out.append(x)
        a, b = find(a), find(b)
        if a is b:
            return
        if a.parts is not None or b.parts is not None:
            return unify((a,), (b,), depth + 1)
        a.segments, b.segments = out, None
    a.label = a.label or b.label
    b.parent = a


def unify(one: Dim, two: Dim, depth: int = 0) -> None:
    """State that both dims index the same elements: refine them to common atoms and join those."""
    while True:
        xs, ys = atoms(one), atoms(two)
        pair = next(((p, q) for p, q in zip(xs, ys, strict=False) if p is not q), None)
        if pair is None:
            if len(xs) != len(ys):
                raise Conflict(f"{total(one)} elements meet {total(two)}")
            return
        small, big = sorted(pair, key=lambda axis: axis.size)
        if small.size == big.size:
            _merge(small, big, depth)
        else:
            split(big, small.size)


# ---------------------------------------------------------------- what stays


def kept_total(dim: Dim, kept: Mapping[Axis, int]) -> int:
    """Number of elements of ``dim`` when each leaf axis in ``kept`` holds that many."""
    result = 1
    for axis in atoms(dim):
        if axis.segments is not None:
            result *= sum(kept_total(s, kept) for s in axis.segments)
        else:
            result *= kept.get(axis, axis.size)
    return result


def real_size(size: int, sizes: Mapping[int, Count]) -> Count:
    """``size`` with the numbers that stand for symbolic sizes (see ``Axes.sizes``) replaced by actual ones."""
    if size in sizes:
        return sizes[size]
    real: Any = 1
    for number, one in sizes.items():
        while number > 1 and size >= number and size % number == 0:
            size, real = size // number, real * one
    return size * real


def kept_index(dim: Dim, keep: Keep, sizes: Mapping[int, int] | None = None) -> Tensor:
    """Positions of ``dim`` that stay, ascending within each axis: the index that slices a tensor along it. [kept]

    ``sizes`` maps stand-ins of symbolic sizes to actual ones; needed when ``dim`` holds a symbolic axis.
    """
    index, sizes = torch.zeros(1, dtype=torch.long), sizes or {}
    for axis in atoms(dim):
        if axis.segments is not None:
            offset, pieces = 0, []
            for segment in axis.segments:
                pieces.append(kept_index(segment, keep, sizes) + offset)
                offset += math.prod(real_size(a.size, sizes) for a in atoms(segment))
            positions, size = torch.cat(pieces), offset
        else:
            size = real_size(axis.size, sizes)
            positions = keep[axis] if axis in keep else torch.arange(size)
        index = (index[:, None] * size + positions[None]).flatten()
    return index


def element_of(dim: Dim, axis: Axis, sizes: Mapping[int, int] | None = None) -> Tensor:
    """Which element of leaf ``axis`` each position of ``dim`` belongs to; -1 where it belongs to none. [total]

    ``sizes`` as in :func:`kept_index`. A group's elements in a batch axis work the same way: ask for that leaf.
    """
    label, sizes = torch.full((1,), -1, dtype=torch.long), sizes or {}
    for atom in atoms(dim):
        if atom.segments is not None:
            mine = torch.cat([element_of(s, axis, sizes) for s in atom.segments])
        elif atom is axis:
            mine = torch.arange(real_size(atom.size, sizes))
        else:
            mine = torch.full((real_size(atom.size, sizes),), -1, dtype=torch.long)
        # at most one factor of a product speaks for the axis; the larger label is the one that is not -1
        label = torch.maximum(label[:, None], mine[None]).flatten()
    return label


def show(dim: Dim, names: Mapping[Axis, str] | None = None) -> str:
    """``dim`` as text: ``3·head·dim``, sums as ``(q+k+v)``, unnamed atoms by size, ``1`` for the empty product."""
    names = names or {}
    words = []
    for axis in atoms(dim):
        if axis in names:
            words.append(names[axis])
        elif axis.segments is not None:
            words.append("(" + "+".join(show(s, names) for s in axis.segments) + ")")
        else:
            words.append(axis.label or str(axis.size))
    return "·".join(words) or "1"
