"""What a residual stream is used for: who writes it, who normalises and who reads it; or why it cannot be rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ....ir.axes import Axes
from ....ir.axis import Axis, Dim, atoms, leaves, leaves_of, total
from ....ir.constants import constant_nodes, evaluate
from ....ir.dataflow import MOVES, Family, bind, family, op_name, product
from ....ir.norms import RowNorm, row_norms
from ....ir.program import Program

CARRIES = MOVES | {Family.PICK, Family.SPLIT, Family.JOIN, Family.EXPAND, Family.REPEAT, Family.LOOKUP, Family.MEAN}
"""Linear, and constants stay constants: what a norm's bias has added may be taken out behind it."""


class NotRotatable(Exception):
    """A use of the stream that no rewrite of weights can follow; the text names the node."""


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of a constant tensor in the place where a stream is written or read, see ``rewrite``.

    source   the tensor, or what is computed of parameters alone
    out      its dimension that a stream is written along, ``written``; None where it only reads
    into     its dimension that is summed over with a stream, ``read``; None where it only writes
    scale    factors along ``out``, of a layer scale. [D]
    gamma    factors along ``into``, of the norm before it. [D]
    shift    added first: what the norm's bias gives behind a reader. [outputs]
    """

    source: Node
    out: int | None = None
    into: int | None = None
    written: Axis | None = None
    read: Axis | None = None
    scale: Tensor | None = None
    gamma: Tensor | None = None
    shift: Tensor | None = None

    @property
    def place(self) -> tuple[object, ...]:
        """Where it lies in which streams."""
        return self.out, self.into, self.written, self.read

    def same(self, other: Change) -> bool:
        """Whether both make the same of equal tensors."""
        pairs = [(getattr(self, n), getattr(other, n)) for n in ("scale", "gamma", "shift")]
        alike = all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)
        return alike and self.place == other.place

    def and_(self, other: Change) -> Change:
        """Both at once: of one stream it is read from, of another that it is written to."""
        more = {f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **more)


@dataclass(frozen=True, eq=False)
class Uses:
    """All that touches one stream.

    changes  (the node, what it is to be given in place of ``Change.source``)
    biases   (a reader without a bias, its weight, what it is to add. [outputs])
    norms    in graph order;  dropped: (a scale, shift or factor that is folded into weights, its operand)
    readers  name of a product that reads the stream -> name of the norm between them, or ""
    """

    axis: Axis
    centred: bool
    changes: tuple[tuple[Node, Change], ...]
    biases: tuple[tuple[Node, Node, Tensor], ...]
    norms: tuple[RowNorm, ...]
    dropped: tuple[tuple[Node, Node], ...]
    readers: Mapping[str, str]


def find_uses(program: Program, axis: Axis) -> Uses:
    """The uses of the stream along ``axis``. Raises NotRotatable naming the node that stands in the way."""
    return _Trace(program, axis).follow()


@dataclass(frozen=True, eq=False)
class _Value:
    """A value along the stream: the stream itself (``norm`` None), or gamma * n + beta behind a norm."""

    norm: RowNorm | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


@dataclass
class _Writer:
    node: Node
    changes: list[Change]
    scale: Tensor | None = None


@dataclass
class _Trace:
    program: Program
    axis: Axis
    values: dict[Node, _Value] = field(default_factory=dict)
    writers: dict[Node, _Writer] = field(default_factory=dict)
    changes: list[tuple[Node, Change]] = field(default_factory=list)
    biases: list[tuple[Node, Node, Tensor]] = field(default_factory=list)
    norms: list[RowNorm] = field(default_factory=list)
    dropped: list[tuple[Node, Node]] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.axes: Axes = self.program.need("axes")
        self.constants = constant_nodes(self.program)
        self.here = {n for n in self.program.graph.nodes if self.axis in set(leaves_of(self.axes.dims.get(n.name)))}

    def follow(self) -> Uses:
        norms = {n.node: n for n in row_norms(self.program.graph) if n.source in self.here}
        inside = {node for norm in norms.values() for node in norm.inside}
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node in self.constants or node in inside:
                continue
            if node not in self.here and not self.here.intersection(node.all_input_nodes):
                continue
            if not isinstance(node.meta.get("val"), Tensor | list | tuple) or family(node) is Family.CHECK:
                continue
            if node in norms:
                self._norm(norms[node])
            else:
                self._visit(node)
        if not self.norms:
            raise NotRotatable("no norm of rows reads it")
        centred = self.norms[0].centred
        odd = next((n.node for n in self.norms if n.centred is not centred), None)
        if odd is not None:
            raise NotRotatable(f"{odd.name} centres its rows, other norms of the stream do not")
        raw = next((name for name, norm in self.readers.items() if not norm), None)
        if centred and raw is not None:
            raise NotRotatable(f"{raw} reads the stream as it is, and the norms centre it")
        written = [(w.node, replace(c, scale=w.scale)) for w in self.writers.values() for c in w.changes]
        return Uses(
            self.axis,
            centred,
            (*written, *self.changes),
            tuple(self.biases),
            tuple(self.norms),
            tuple(self.dropped),
            self.readers,
        )

    # ------------------------------------------------------------ one node

    def _visit(self, node: Node) -> None:
        does = family(node)
        if product(node) is not None:
            self._product(node)
        elif op_name(node) == "embedding":
            self._table(node)
        elif does is Family.ADD:
            self._add(node)
        elif does is Family.MULTIPLY or op_name(node) in ("div", "divide"):
            self._multiply(node)
        elif does in CARRIES or does is Family.SUM or (does is Family.POOL and "adaptive_avg" in op_name(node)):
            self._carry(node)
        else:
            raise NotRotatable(f"{op_name(node)} at {node.name} is nothing that a rotation of the channels follows")

    def _norm(self, norm: RowNorm) -> None:
        value, rank = self.values.get(norm.source), len(self._dims(norm.source))
        if value is None or value.norm is not None:
            raise NotRotatable(f"{norm.node.name} normalises what is normalised already")
        if self._where(norm.source) != rank - 1:
            raise NotRotatable(f"{norm.node.name} normalises something else")
        if norm.width is not None:
            raise NotRotatable(f"{norm.node.name} divides by a width of its own: the stream is in a basis already")
        gamma, beta = (None if n is None else self._vector(n, norm.node) for n in (norm.weight, norm.bias))
        self.norms.append(norm)
        self.values[norm.node] = _Value(norm, gamma, beta)

    def _product(self, node: Node) -> None:
        one, args = product(node), bind(node)
        assert one is not None
        left, weight, bias = args[one.left], args[one.right], args.get(one.added)
        dims = self._dims(weight) if isinstance(weight, Node) and weight in self.constants else []
        if one.form in ("", "deconv") or args.get("groups", 1) != 1 or args.get("transposed"):
            raise NotRotatable(f"{node.name} is {op_name(node)}, which is not solved for")
        if len(dims) < 2 or (one.form != "conv" and len(dims) != 2):
            raise NotRotatable(f"{node.name} multiplies two activations")
        into, out = (0, 1) if one.form == "transposed" else (1, 0)
        reads, writes = self._is(dims[into]), self._is(dims[out])
        if (left in self.here) != reads or (node in self.here) != writes:
            raise NotRotatable(f"{node.name} hands the channels on, or sees them as factors of something else")
        change = Change(weight)
        if writes:
            change = replace(change, out=out, written=self.axis)
        shift = None
        if reads:
            value = self._value(left, node)
            rank = len(self._dims(left))
            if self._where(left) != (1 if one.form == "conv" else rank - 1):
                raise NotRotatable(f"{node.name} sums over other dimensions")
            change = replace(change, into=into, read=self.axis, gamma=value.gamma)
            shift = self._behind(node, weight, value.beta, into)
            self.readers[node.name] = "" if value.norm is None else value.norm.node.name
        if isinstance(bias, Node) and (bias not in self.constants or len(self._dims(bias)) != 1):
            raise NotRotatable(f"{node.name} adds something that is no bias")
        changes = [change]
        if isinstance(bias, Node) and (writes or shift is not None):
            more = Change(bias, shift=shift)
            changes.append(replace(more, out=0, written=self.axis) if writes else more)
        elif shift is not None:
            self.biases.append((node, weight, shift))
        if writes:
            self.writers[node], self.values[node] = _Writer(node, changes), _Value()
        else:
            self.changes += [(node, c) for c in changes]

    def _behind(self, node: Node, weight: Node, beta: Tensor | None, into: int) -> Tensor | None:
        """What the bias of the norm gives behind a reader. [outputs]"""
        if beta is None or not bool(beta.any()):
            return None
        matrix = self._evaluate(weight).movedim(into, -1)
        if matrix[0].numel() != matrix.shape[-1]:
            raise NotRotatable(f"{node.name} reads its neighbours behind a norm with a bias")
        return matrix.reshape(len(matrix), -1) @ beta

    def _table(self, node: Node) -> None:
        weight = bind(node)["weight"]
        dims = self._dims(weight)
        if weight not in self.constants or not self._is(dims[1]) or self.axis in set(leaves(dims[0])):
            raise NotRotatable(f"{node.name} looks up rows of something else")
        self.writers[node], self.values[node] = _Writer(node, [Change(weight, 1, written=self.axis)]), _Value()

    def _add(self, node: Node) -> None:
        sides = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(sides) < 2:
            raise NotRotatable(f"{node.name} adds the same to every channel")
        known = [self._value(a, node) for a in sides if a not in self.constants]
        normed = [v for v in known if v.norm is not None]
        if not normed:
            for side in sides:
                if self._where(side) is None:
                    raise NotRotatable(f"{node.name} adds the same to every channel")
                if side in self.constants:
                    self._take(node, side)
            self.values[node] = _Value()
        elif len(known) == 2:
            raise NotRotatable(f"{node.name} adds what a norm gave to the stream (post-norm)")
        else:
            other = next(a for a in sides if a in self.constants)
            value, operand = normed[0], next(a for a in sides if a is not other)
            if op_name(node) != "add" or bind(node).get("alpha", 1) != 1:
                raise NotRotatable(f"{node.name} subtracts from what is normalised")
            more = self._vector(other, node)
            self._drop(node, operand)
            self.values[node] = replace(value, beta=more if value.beta is None else value.beta + more)

    def _multiply(self, node: Node) -> None:
        one, two = node.args[:2]
        if op_name(node).startswith("mul") and (one not in self.here or one in self.constants):
            one, two = two, one
        if not isinstance(one, Node) or one not in self.here or one in self.constants:
            raise NotRotatable(f"{op_name(node)} at {node.name} is nothing that a rotation of the channels follows")
        value = self._value(one, node)
        if isinstance(two, Node) and two in self.here:
            if two not in self.constants or op_name(node).startswith("div"):
                raise NotRotatable(f"{node.name} multiplies the channels by others")
            factor = self._vector(two, node)
            if value.norm is None:
                self._scale(node, one, factor)
            else:
                gamma = factor if value.gamma is None else value.gamma * factor
                value = replace(value, gamma=gamma, beta=None if value.beta is None else value.beta * factor)
            self._drop(node, one)
        elif value.beta is not None:
            raise NotRotatable(f"{node.name} scales what a norm gave, its bias included")
        self.values[node] = value

    def _scale(self, node: Node, source: Node, factor: Tensor) -> None:
        """A layer scale: folded into the writer that alone it scales."""
        while source not in self.writers:
            if source in self.dropped_nodes or family(source) not in MOVES or len(source.users) != 1:
                raise NotRotatable(f"{node.name} scales the stream channel by channel")
            source = source.all_input_nodes[0]
        writer = self.writers[source]
        if len(source.users) != 1:
            raise NotRotatable(f"{node.name} scales the stream channel by channel")
        writer.scale = factor if writer.scale is None else writer.scale * factor

    def _carry(self, node: Node) -> None:
        value, dims = node.meta["val"], self.axes.dims.get(node.name)
        whole = isinstance(dims, list) and all(self.axis in set(leaves_of([one])) for one in dims)
        if self._where(node) is None if isinstance(value, Tensor) else not whole:
            raise NotRotatable(f"{node.name} is {op_name(node)} over the channels")
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise NotRotatable(f"{node.name} rounds the stream")
        if family(node) is Family.SHIFT:
            raise NotRotatable(f"{node.name} moves elements of a dimension")
        values = []
        for source in node.all_input_nodes:
            if source in self.here and source in self.constants:
                self._take(node, source)
                values.append(_Value())
            elif source in self.here:
                values.append(self._value(source, node))
            elif isinstance(source.meta.get("val"), Tensor) and family(node) is Family.JOIN:
                raise NotRotatable(f"{node.name} joins the stream with something else")
        normed = [v for v in values if v.norm is not None]
        if normed and len(values) > 1:
            raise NotRotatable(f"{node.name} joins what norms gave")
        if family(node) is Family.SUM and normed and normed[0].beta is not None:
            raise NotRotatable(f"{node.name} adds up what a norm gave, its bias included")
        self.values[node] = values[0]

    # ------------------------------------------------------------ what is known

    @property
    def dropped_nodes(self) -> set[Node]:
        return {node for node, _ in self.dropped}

    def _drop(self, node: Node, operand: Node) -> None:
        if len(node.meta["val"].shape) != len(operand.meta["val"].shape):
            raise NotRotatable(f"{node.name} gives its operand more dimensions")
        self.dropped.append((node, operand))

    def _take(self, node: Node, constant: Node) -> None:
        """A table that is part of the stream: class token, positions."""
        where = self._where(constant)
        if where is None:
            raise NotRotatable(f"{node.name} adds the same to every channel")
        self.changes.append((node, Change(constant, where, written=self.axis)))

    def _value(self, node: Any, reader: Node) -> _Value:
        found = self.values.get(node)
        if found is None:
            raise NotRotatable(f"{reader.name} reads channels that come from elsewhere")
        return found

    def _where(self, node: Node) -> int | None:
        """The dimension of ``node`` that is the stream; None where it has none."""
        found = [i for i, dim in enumerate(self._dims(node)) if self.axis in set(leaves(dim))]
        if len(found) > 1 or (found and not self._is(self._dims(node)[found[0]])):
            raise NotRotatable(f"{node.name} merges the channels with something else")
        return found[0] if found else None

    def _is(self, dim: Dim) -> bool:
        return atoms(dim) == (self.axis,)

    def _dims(self, node: Node) -> list[Dim]:
        dims = self.axes.dims.get(node.name)
        return dims if isinstance(dims, list) else []

    def _vector(self, constant: Node, reader: Node) -> Tensor:
        """A factor or summand per channel. [D]"""
        dims = self._dims(constant)
        if constant not in self.constants or sum(total(d) > 1 for d in dims) != 1 or self._where(constant) is None:
            raise NotRotatable(f"{reader.name} scales or shifts the channels by more than constants")
        return self._evaluate(constant).flatten()

    def _evaluate(self, constant: Node) -> Tensor:
        return evaluate(self.program, [constant])[constant].double()
