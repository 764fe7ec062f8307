"""Where the basis of a width is free: a layer makes each factor of a product of two activations, and nothing else
reads what it makes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from ....ir.axes import Axes, Contraction
from ....ir.axis import Axis, Dim, Dims, element_of, leaves, total
from ....ir.dataflow import VIEWS, Family, Product, bind, family, op_name, product
from ....ir.group import Kind, PruneGroup
from ....ir.program import Program
from ....ir.provenance import first_line
from .stored import Store, Stored

KINDS = (Kind.QK, Kind.V, Kind.QKV)
MOVED = VIEWS | {Family.DROPOUT, Family.PART, Family.PICK, Family.SPLIT, Family.EXPAND, Family.REPEAT}
"""What may stand between a layer and the product: every element stays what it is, in a place of its own."""
SAME = {Family.CAST, Family.DROPOUT}
SCALES = {"mul", "multiply", "div", "divide"}


class NotFree(Exception):
    """The basis of a width must stay what it is: the message says why, for people."""


@dataclass(frozen=True)
class Side:
    """One factor: a layer whose outputs are its elements, or (``reads``) whose inputs are.

    node    the layer;  weight, bias: the nodes that it multiplies and adds; bias is None where there is none
    form    ``linear`` [out, in], ``transposed`` [in, out] or ``conv`` [out, in, ..kernel]: how the weight lies
    rows    which output (input) of the layer element i of copy c of head h is. [heads, copies, width] int64; copies are
            query heads that share a key head
    """

    node: Node
    weight: Node
    bias: Node | None
    form: str
    rows: Tensor
    reads: bool = False

    def vectors(self, store: Store) -> Stored:
        """The weight with a row per output (with ``reads``: per input). [n, ..]"""
        whole = store.trace(self.weight)
        assert whole is not None
        turned = (self.form == "transposed") != self.reads
        return whole.view(lambda t: (t.transpose(0, 1) if turned else t).flatten(1))

    def shifts(self, store: Store) -> Stored | None:
        """The bias, where it moves with the rows. [n]"""
        return None if self.bias is None or self.reads else store.trace(self.bias)


@dataclass(frozen=True)
class Site:
    """A width whose basis is free. ``keys``: which side holds keys, 0 or 1, where a softmax runs over them."""

    group: PruneGroup
    sides: tuple[Side, Side]
    keys: int | None = None

    def is_centred(self, side: int) -> bool:
        """Whether what is the same in every row of that side does not matter: of keys to a softmax, of values where a
        bias makes up for it."""
        return side == self.keys or (side == 1 and self.sides[0].reads and self.sides[0].bias is not None)


def find_sites(program: Program, groups: Sequence[PruneGroup]) -> tuple[list[Site], dict[str, str]]:
    """(where the basis is free, group -> why it is not) among query/key and value widths that are not frozen."""
    finder, found, stays = _Finder(program), list[Site](), dict[str, str]()
    for group in groups:
        if group.kind in KINDS and group.prunable:
            try:
                found.append(finder.at(group))
            except NotFree as why:
                stays[group.name] = str(why)
    return found, stays


class _Finder:
    def __init__(self, program: Program) -> None:
        self.axes: Axes = program.need("axes")
        self.store, self.nodes = Store(program), {n.name: n for n in program.graph.nodes}
        self.holders: dict[Axis, list[Node]] = {}
        for name, dims in self.axes.dims.items():
            for axis in {a for dim in _each(dims) for a in leaves(dim)} if name in self.nodes else ():
                self.holders.setdefault(axis, []).append(self.nodes[name])

    def at(self, group: PruneGroup) -> Site:
        axis = group.axis
        if group.kind is Kind.QKV:
            raise NotFree("queries, keys and values share this width, and one basis cannot suit all three")
        for one in self.axes.statistics:
            if axis in leaves(one.dim):
                raise NotFree(f"a norm over it stands between projection and product, at {one.node}")
        summed = [c for c in self.axes.contractions if axis in leaves(c.dim)]
        if len({c.node for c in summed}) != 1:
            raise NotFree(f"more than one product sums over it: {', '.join(sorted({c.node for c in summed}))}")
        site = self._query_key(group, summed[0]) if group.kind is Kind.QK else self._value(group, summed[0])
        self._check_shared(site)
        return site

    # ------------------------------------------------------------ the two forms

    def _query_key(self, group: PruneGroup, summed: Contraction) -> Site:
        self._check_turned(group.axis, summed)
        node = self.nodes[summed.node]
        found = [_operand(node, path) for path, _ in summed.operands]
        if len(found) != 2:
            raise NotFree(f"{node.name} multiplies {len(found)} things at once")
        owned = {node}
        ways = [self._back(source, group.axis, owned) for source in found]
        self._check_owned(group.axis, owned)
        rows = self._pair([self._label(way, group.axis) for way in ways])
        one, two = (self._maker(way[-1], r) for way, r in zip(ways, rows, strict=True))
        return Site(group, (one, two), _keys(node, summed))

    def _value(self, group: PruneGroup, summed: Contraction) -> Site:
        axis, closing = group.axis, self.nodes[summed.node]
        made = [m.node for m in self.axes.matmuls if m.form == "matmul" and axis in {*leaves(m.n), *leaves(m.m)}]
        if len(set(made)) != 1:
            raise NotFree("it is not made by one product of attention and values")
        node = self.nodes[made[0]]
        found = [n for n in node.all_input_nodes if self._holds(n, axis)]
        if len(found) != 1:
            raise NotFree(f"{node.name} reads it more than once")
        owned = {node, closing}
        way = self._back(found[0], axis, owned)
        one, weight, bias = self._layer(closing)
        self._own(closing, owned)
        self._check_owned(axis, owned)
        into = self.axes.dims[weight.name][0 if one.form == "transposed" else 1]
        read = _Labelled([into], dict.fromkeys(leaves(into), 0), axis, torch.arange(total(into)))
        left, right = self._pair([read, self._label(way, axis)])
        return Site(group, (Side(closing, weight, bias, one.form, left, True), self._maker(way[-1], right)))

    # ------------------------------------------------------------ ways

    def _holds(self, node: Node, axis: Axis) -> bool:
        return any(axis in leaves(dim) for dim in _each(self.axes.dims.get(node.name)))

    def _back(self, node: Node, axis: Axis, owned: set[Node]) -> list[Node]:
        """From a factor back to the layer that makes it, which is the last. Adds what it meets to ``owned``."""
        way = [node]
        while True:
            owned.add(node)
            holding = [n for n in node.all_input_nodes if self._holds(n, axis)]
            if product(node) is not None:
                self._own(node, owned)
                return way
            if node.op == "placeholder":
                raise NotFree(f"{node.name} is no layer's output")
            if not self._passes(node, axis) or len(holding) != 1:
                raise NotFree(f"{node.name} ({op_name(node)}) stands between projection and product")
            node = holding[0]
            way.append(node)

    def _own(self, layer: Node, owned: set[Node]) -> None:
        """What the layer multiplies and adds, back to what is stored, belongs to it."""
        one, args = product(layer), bind(layer)
        assert one is not None
        pending = [args[n] for n in (one.right, one.added) if isinstance(args.get(n), Node)]
        while pending:
            owned.add(node := pending.pop())
            pending += node.all_input_nodes

    def _passes(self, node: Node, axis: Axis) -> bool:
        """Whether it moves the elements of ``axis``, or scales all those of a head alike."""
        if node.op != "call_function":
            return False
        if node.target is operator.getitem or family(node) in MOVED:
            return True
        holding = [n for n in node.all_input_nodes if self._holds(n, axis)]
        if op_name(node) not in SCALES or len(holding) != 1 or node.args[0] is not holding[0]:
            return False
        before, after = holding[0].meta["val"], node.meta["val"]
        return len(before.shape) == len(after.shape) and not bind(node).get("rounding_mode")

    def _check_owned(self, axis: Axis, owned: set[Node]) -> None:
        """Raise NotFree where something beside the two ways holds the elements, and does more than to move them on."""
        for node in self.holders.get(axis, ()):
            if node not in owned and node.op == "placeholder":
                raise NotFree(f"{node.name} has values of its own for its elements")
            if node not in owned and not self._passes(node, axis):
                raise NotFree(f"{node.name} ({op_name(node)}) reads it as well")
            for user in node.users:  # what holds the elements no more has made something else of them
                tensor = isinstance(user.meta.get("val"), Tensor)
                if tensor and user not in owned and family(user) not in MOVED and not self._holds(user, axis):
                    raise NotFree(f"{user.name} ({op_name(user)}) reads it as well")

    def _check_turned(self, axis: Axis, summed: Contraction) -> None:
        if tuple(leaves(summed.dim)) == (axis,):
            return
        for node in self.holders[axis]:
            both = [n for n in node.all_input_nodes if self._holds(n, axis)]
            if op_name(node) in SCALES and len(both) == 2:
                raise NotFree(f"rotary positions turn its pairs, at {node.name}: pairs are chosen, not mixed")
        raise NotFree(f"{summed.node} sums over more than it")

    # ------------------------------------------------------------ layers

    def _maker(self, node: Node, rows: Tensor) -> Side:
        one, weight, bias = self._layer(node)
        if bias is not None and self.store.trace(bias) is None:
            raise NotFree(f"the bias of {node.name} is computed, not stored")
        return Side(node, weight, bias, one.form, rows)

    def _layer(self, node: Node) -> tuple[Product, Node, Node | None]:
        """(what it multiplies, its weight, its bias). Raises NotFree where it is no layer with a stored weight."""
        one, args = product(node), bind(node)
        plain = not args.get("transposed") and args.get("groups", 1) == args.get("beta", 1) == args.get("alpha", 1) == 1
        if one is None or one.form not in ("linear", "transposed", "conv") or not plain:
            raise NotFree(f"{node.name} ({op_name(node)}) is no linear layer")
        weight, bias = args.get(one.right), args.get(one.added)
        found = self.store.trace(weight) if isinstance(weight, Node) else None
        if found is None or not isinstance(weight, Node):
            raise NotFree(f"the weight of {node.name} is computed, not stored")
        if not all(self.store.tensors[name].is_floating_point() for name in found.present()):
            raise NotFree(f"the weight of {node.name} holds no floating numbers")
        return one, weight, bias if isinstance(bias, Node) else None

    def _check_shared(self, site: Site) -> None:
        """Raise NotFree where somebody else reads what would change, or both sides are the same rows."""
        layers, changed = {side.node for side in site.sides}, dict[str, Tensor]()
        for side in site.sides:
            index, shifts = side.rows.flatten(), side.shifts(self.store)
            for whole in (side.vectors(self.store), *([] if shifts is None else [shifts])):
                mine = whole.view(lambda t, index=index: t[index])  # type: ignore[misc]
                for name in mine.names:
                    touched = mine.touches(name, self.store.tensors[name].numel())
                    if bool((touched & changed.get(name, torch.zeros_like(touched))).any()):
                        raise NotFree(f"{name} makes both factors")
                    changed[name] = touched | changed.get(name, torch.zeros_like(touched))
        for name, touched in changed.items():
            if bool(touched.any()) and not self.store.is_alone(name):
                raise NotFree(f"its weight {name} is shared")
            for user, value in self.store.readers(name):
                other = None if user in layers else self.store.trace(value)
                if user not in layers and (other is None or bool((touched & other.touches(name, len(touched))).any())):
                    raise NotFree(f"{user.name} reads its weight {name} as well")

    # ------------------------------------------------------------ which row is which

    def _label(self, way: Sequence[Node], axis: Axis) -> _Labelled:
        """The factor, each entry with the number of the layer's output that it is: numbers sent the way of values."""
        layer, real = way[-1], self.axes.stand_ins.real
        shape = [real(s) for s in layer.meta["val"].shape]
        channel = 1 if (one := product(layer)) is not None and one.form == "conv" else len(shape) - 1
        view = [shape[channel] if i == channel else 1 for i in range(len(shape))]
        value: Any = torch.arange(shape[channel], dtype=torch.float64).view(view).expand(shape)
        for node, before in zip(reversed(way[:-1]), reversed(way[1:]), strict=True):
            if op_name(node) in SCALES or family(node) in SAME:
                continue

            def of(n: Node, before: Node = before, value: Any = value) -> Any:
                return value if n is before else real(n.meta["val"])

            args, kwargs = map_arg((node.args, node.kwargs), of)
            try:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError) as error:
                raise NotFree(f"{node.name} ({op_name(node)}) cannot be followed: {first_line(error)}") from None
        dims: Dims = self.axes.dims[way[0].name]
        made = set(leaves(self.axes.dims[layer.name][channel]))
        where = {a: i for i, dim in enumerate(dims) for a in leaves(dim) if a in made}
        return _Labelled(dims, where, axis, value)

    def _pair(self, both: Sequence[_Labelled]) -> list[Tensor]:
        """The rows of both sides, heads that they share first."""
        one, two = both
        shared = [a for a in one.where if a in two.where and a is not one.axis]
        return [side.rows(shared, self.axes.sizes) for side in both]


@dataclass(frozen=True)
class _Labelled:
    """A tensor of row numbers, its dims, and in which of them the width and the heads are."""

    dims: Dims
    where: Mapping[Axis, int]
    axis: Axis
    value: Tensor

    def rows(self, shared: Sequence[Axis], sizes: Mapping[int, int]) -> Tensor:
        """[heads, copies, width], see ``Side.rows``. Raises NotFree where entries cannot be told apart."""
        if self.axis not in self.where:
            raise NotFree("its elements cannot be followed to the layer that makes them")
        own = [a for a in self.where if a not in shared and a is not self.axis]
        heads, copies = (math.prod(a.size for a in part) for part in (shared, own))
        code, here = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
        for axis in (*shared, *own, self.axis):
            position = self.where[axis]
            label = element_of(self.dims[position], axis, sizes)
            shape = [len(label) if i == position else 1 for i in range(len(self.dims))]
            code, here = code * axis.size + label.clamp_min(0).view(shape), here & (label >= 0).view(shape)
        number = self.value.long()
        code, here = code.expand_as(number)[here.expand_as(number)], number[here.expand_as(number)]
        rows = torch.full((heads * copies * self.axis.size,), -1)
        rows[code] = here
        if not torch.equal(rows[code], here) or bool((rows < 0).any()) or len(rows.unique()) != len(rows):
            raise NotFree("its elements cannot be told apart where they are multiplied")
        return rows.view(heads, copies, self.axis.size)


def _each(dims: Any) -> Iterator[Dim]:
    if isinstance(dims, tuple):
        yield dims
    elif dims is not None:
        for one in dims:
            yield from _each(one)


def _operand(node: Node, path: str) -> Node:
    name, _, index = path.partition(".")
    value = bind(node)[name]
    found = value[int(index)] if index else value
    assert isinstance(found, Node)
    return found


def _keys(node: Node, summed: Contraction) -> int | None:
    """Which operand holds the keys: the one that has the dimension over which a softmax runs behind the product."""
    if family(node) is Family.ATTENTION:
        return [path for path, _ in summed.operands].index("key")
    rank, current = len(node.meta["val"].shape), node
    while len(current.users) == 1:
        current = next(iter(current.users))
        value, does = current.meta.get("val"), family(current)
        if does is Family.SOFTMAX:
            return _holder(node, int(bind(current).get("dim", -1)) % rank, rank)
        if not isinstance(value, Tensor) or len(value.shape) != rank or does in (Family.PERMUTE, Family.RESHAPE):
            return None
    return None


def _holder(node: Node, at: int, rank: int) -> int | None:
    if op_name(node) != "einsum":
        return {rank - 1: 1, rank - 2: 0}.get(at)
    left, _, right = str(bind(node)["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or not right:
        return None
    found = [i for i, term in enumerate(terms) if right[at] in term]
    return found[0] if len(found) == 1 else None
