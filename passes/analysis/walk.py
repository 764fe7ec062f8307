"""The walk over an exported graph that says what every tensor dimension is made of.

Rules (one file per op family in ``rules/``) see a :class:`Walk` and an :class:`Args`; they unify dims, state facts
about them and return the output's dims. Facts attach to *dims* and are resolved to leaf axes only when the walk is
over, so a later split or merge needs no bookkeeping.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from ...ir.axes import Axes, Contraction, Frozen, Literal, Matmul, Statistic
from ...ir.axis import Conflict, Dim, Dims, new_dim, total, unify
from ...ir.program import Program

FIRST_PRIME = 1_000_003


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


def bind(node: Node) -> dict[str, Any]:
    """Schema argument name -> argument, defaults filled in; positional names ``0``, ``1``.. for plain functions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    bound = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif i < len(node.args):
            bound[argument.name] = node.args[i]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


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


def op_name(node: Node) -> str:
    """``linear`` for aten.linear.default, ``lib::op`` for ops of other libraries, the name for plain functions."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return getattr(node.target, "__name__", str(node.target))


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
        self._primes: dict[Any, int] = {}
        self._hints = _symbol_hints(program)
        self.sizes: dict[int, int] = {}

    def axes(self) -> Axes:
        return Axes(
            dims={node.name: dims for node, dims in self.dims.items()},
            literals=tuple(self.literals),
            contractions=tuple(self.contractions),
            statistics=tuple(self.statistics),
            matmuls=tuple(self.matmuls),
            frozen=tuple(self.frozen),
            tags={kind: tuple(facts) for kind, facts in self.tags.items()},
            sizes=self.sizes,
            symbols={prime: str(symbol) for symbol, prime in self._primes.items()},
            unknown=dict(self.unknown),
            conflicts=tuple(self.conflicts),
        )

    # ------------------------------------------------------------ sizes

    def size(self, size: int | SymInt) -> int:
        """A size as an int. Every symbol stands for a prime of its own above a million, so that ``B*H`` factors
        unambiguously and no static size can be mistaken for the batch."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._primes:
                prime = _next_prime(max(self._primes.values(), default=FIRST_PRIME - 1))
                self._primes[symbol] = prime
                self.sizes[prime] = self._hints.get(str(symbol), 2)
        value = int(expr.subs({s: self._primes[s] for s in expr.free_symbols}))
        if value not in self.sizes and not _is_product(value, self._primes.values()):
            self.sizes[value] = int(expr.subs({s: self.sizes[self._primes[s]] for s in expr.free_symbols}))
        return value

    def shape(self, node: Node | None = None) -> list[int]:
        return [self.size(s) for s in (node or self.node).meta["val"].shape]

    @staticmethod
    def symbolic(size: int) -> bool:
        return size >= FIRST_PRIME

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
        why = f"two views of one axis disagree: {reason}"
        self.conflicts.append((self.node.name, str(reason)))
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
        while (
            isinstance(node, Node)
            and node.op == "call_function"
            and op_name(node)
            in ("t", "transpose", "numpy_T", "mT", "permute", "view", "reshape", "unsqueeze", "to", "contiguous")
        ):
            node = node.args[0]
        parameters = self.program.exported.graph_signature.inputs_to_parameters
        return isinstance(node, Node) and node.name in parameters


def _symbol_hints(program: Program) -> dict[str, int]:
    """Symbol name -> its value in the example inputs."""
    from torch.utils import _pytree as pytree

    hints: dict[str, int] = {}
    if program.exported.example_inputs is None:
        return hints
    flat = iter(pytree.tree_leaves(program.exported.example_inputs))
    bound = program.tensor_of_placeholder
    for node in program.placeholders():
        if node.name in bound:
            continue
        example, value = next(flat, None), node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(example, Tensor):
            for symbol, real in zip(value.shape, example.shape, strict=True):
                if isinstance(symbol, SymInt) and symbol.node.expr.is_symbol:
                    hints[str(symbol.node.expr)] = real
    return hints


def _next_prime(above: int) -> int:
    candidate = above + 1 + above % 2
    while any(candidate % d == 0 for d in range(3, int(candidate**0.5) + 1, 2)):
        candidate += 2
    return candidate


def _is_product(value: int, primes: Iterable[int]) -> bool:
    """True for static * primes: those need no entry of their own, their factors have one."""
    for prime in primes:
        while value % prime == 0:
            value //= prime
    return value < FIRST_PRIME
