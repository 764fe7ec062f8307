"""The walk over an exported graph that says what every tensor dimension is made of.

Rules (one file per op family in ``rules/``) see a :class:`Walk` and an :class:`Args`; they unify dims, state facts
about them and return the output's dims. Facts attach to *dims* and are resolved to leaf axes only when the walk is
over, so a later split or merge needs no bookkeeping.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...ir.axes import Axes, Contraction, Frozen, Literal, Matmul, Statistic
from ...ir.axis import OPEN, Conflict, Dim, Dims, new_dim, total, unify
from ...ir.dataflow import behind_views, bind
from ...ir.example_sizes import stand_ins
from ...ir.program import Program


class Multi(list[Any]):
    """Dims of several outputs, one entry each."""


class Args:
    """A node's arguments by schema name, tensors replaced by their dims. ``raw(name)`` is the untouched argument."""

    def __init__(self, node: Node, dims: dict[Node, Any]) -> None:
        self._raw = bind(node)
        self._values = {k: _resolve(v, dims) for k, v in self._raw.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def raw(self, name: str) -> Any:
        return self._raw.get(name)

    def tensors(self) -> list[Dims]:
        """Dims of every tensor argument, in order."""
        flat: list[Dims] = []
        for raw, value in zip(self._raw.values(), self._values.values(), strict=True):
            for r, v in zip(raw, value, strict=True) if isinstance(raw, list | tuple) else [(raw, value)]:
                if isinstance(r, Node) and v is not None:
                    flat.append(v)
        return flat


def _resolve(value: Any, dims: dict[Node, Any]) -> Any:
    if isinstance(value, Node):
        return dims[value]
    if isinstance(value, list | tuple):
        return [_resolve(v, dims) if isinstance(v, Node) else v for v in value]
    return value


Rule = Callable[["Walk", Args], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten ops by name (``linear``), or for another library's op by full name (``lib::op``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class Walk:
    """What rules say of one graph, node by node (``PropagateAxes`` has the loop); :meth:`axes` is the result."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dims: dict[Node, Any] = {}
        self.node: Node = next(iter(program.graph.nodes))
        self.literals: list[Literal] = []
        self.contractions: list[Contraction] = []
        self.statistics: list[Statistic] = []
        self.matmuls: list[Matmul] = []
        self.frozen: list[Frozen] = []
        self.tags: dict[str, list[tuple[Dim, str]]] = collections.defaultdict(list)
        self.unknown: collections.Counter[str] = collections.Counter()
        self.conflicts: list[tuple[str, str]] = []
        self.failed: list[tuple[str, str]] = []
        self.size = stand_ins(program)

    def axes(self) -> Axes:
        return Axes(
            dims={node.name: dims for node, dims in self.dims.items()},
            literals=tuple(self.literals),
            contractions=tuple(self.contractions),
            statistics=tuple(self.statistics),
            matmuls=tuple(self.matmuls),
            frozen=tuple(self.frozen),
            tags={kind: tuple(facts) for kind, facts in self.tags.items()},
            stand_ins=self.size,
            unknown=dict(self.unknown),
            conflicts=tuple(self.conflicts),
            failed=tuple(self.failed),
        )

    # ------------------------------------------------------------ sizes

    def shape(self, node: Node | None = None) -> list[int]:
        return [self.size(s) for s in (node or self.node).meta["val"].shape]

    @staticmethod
    def symbolic(size: int) -> bool:
        return size > OPEN

    # ------------------------------------------------------------ what rules say

    def fresh(self, why: str = "") -> Any:
        """New axes in the shape of the current node's output; frozen when ``why`` is given."""

        def one(value: Any) -> Any:
            return [new_dim(self.size(s)) for s in value.shape] if isinstance(value, Tensor) else None

        value = self.node.meta.get("val")
        out = Multi(map(one, value)) if isinstance(value, list | tuple) else one(value)
        if why:
            self.freeze(out, why)
        return out

    def freeze(self, what: Any, why: str) -> None:
        """``what`` is a dim (tuple), a tensor's dims (list), several of them, or None."""
        if isinstance(what, tuple):
            if total(what) != 1:
                self.frozen.append(Frozen(what, why, self.node.name))
        elif what is not None:
            for part in what:
                self.freeze(part, why)

    def tag(self, kind: str, dim: Dim) -> None:
        self.tags[kind].append((dim, self.node.name))

    def contract(self, dim: Dim, *operands: tuple[str, int]) -> None:
        self.contractions.append(Contraction(self.node.name, dim, operands))

    def statistic(self, dim: Dim, position: int, operand: str = "") -> None:
        self.statistics.append(Statistic(self.node.name, dim, position, operand))

    def matmul(self, batch: Iterable[Dim], m: Dim, k: Dim, n: Dim, form: str = "matmul") -> None:
        self.matmuls.append(Matmul(self.node.name, list(batch), m, k, n, form))

    def literal(self, argument: str, form: str, dims: Iterable[Dim]) -> None:
        self.literals.append(Literal(self.node.name, argument, form, tuple(dims)))

    def unify(self, one: Dim, two: Dim) -> None:
        try:
            unify(one, two)
        except Conflict as conflict:
            self.conflict([one, two], conflict)

    def conflict(self, dims: Iterable[Dim], reason: Conflict) -> str:
        """Freeze the dims of a conflict and remember it; returns the reason as text."""
        why = str(reason)
        self.conflicts.append((self.node.name, why))
        self.freeze(list(dims), why)
        return why

    def broadcast(self, *tensors: Dims) -> Dims:
        """Element-wise broadcasting from the right: dims that meet are unified, unit dims vanish."""
        rank = max(map(len, tensors), default=0)
        out: Dims = []
        for i in range(-rank, 0):
            meeting = [t[i] for t in tensors if len(t) >= -i and total(t[i]) != 1]
            for other in meeting[1:]:
                self.unify(meeting[0], other)
            out.append(meeting[0] if meeting else ())
        return out

    def is_weight(self, node: Any) -> bool:
        """True for a parameter, and for a transposed or reshaped one (``x @ weight.T``)."""
        parameters = self.program.exported.graph_signature.inputs_to_parameters
        return isinstance(node, Node) and behind_views(node).name in parameters

    # ------------------------------------------------------------ what they said, held against the graph

    def as_captured(self, out: Any) -> Any:
        """What a rule gave for the current node, where its sizes are those in the graph.

        An open size that cannot be followed gives a frozen dim. Raises ValueError where a static one differs.
        """
        value = self.node.meta["val"]
        if isinstance(value, Tensor):
            return self._meeting(out, value)
        return Multi(one if one is None else self._meeting(one, v) for one, v in zip(out, value, strict=True))

    def _meeting(self, dims: Dims, value: Tensor) -> Dims:
        wanted = list(map(self.size, value.shape))
        said = [total(d) for d in dims]
        if said == wanted:
            return dims
        out: Dims = []
        for dim, size, want in zip(dims, said, wanted, strict=True):
            if size == want:
                out.append(dim)
                continue
            if not self.symbolic(size) and not self.symbolic(want):
                raise ValueError(f"it says {said}, the graph has {wanted}")
            fresh = new_dim(want)
            self.freeze([dim, fresh], "an open size that cannot be followed")
            out.append(fresh)
        return out

    def take_back(self) -> None:
        """Forget what a rule that failed has said of the current node; dims that it unified stay together."""
        name = self.node.name
        self.literals = [fact for fact in self.literals if fact.node != name]
        self.contractions = [fact for fact in self.contractions if fact.node != name]
        self.statistics = [fact for fact in self.statistics if fact.node != name]
        self.matmuls = [fact for fact in self.matmuls if fact.node != name]
        for kind, tagged in self.tags.items():
            self.tags[kind] = [fact for fact in tagged if fact[1] != name]
