"""Exact removals: what follows a group's consumers is run again, many removals side by side along the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node, map_arg

from ....data.batch import Batch
from ....ir.axes import Axes
from ....ir.axis import atoms
from ....ir.dataflow import bind, is_mutable, op_name, product
from ....ir.example_sizes import sizes_in
from ....ir.group import PruneGroup
from ....ir.program import Program
from ....ir.signature import batch_axes, samples_in, size_at
from .consumers import Consumer, elements
from .features import operand_source, reach
from .mask_gradients import guard_step

FOOTPRINT = 8
"""Values of the largest size that are alive at once while a suffix runs (residual, queries, keys, scores, ...)."""


class Suffix:
    """What has to run again when elements of one group are masked, and what it reads from the dense run.

    nodes      in graph order, from the first consumer on: computed from a consumer, and needed for what is looked at
    frontier   names of the dense values they read
    """

    def __init__(self, sides: Sequence[Consumer], looked_at: Sequence[Node]) -> None:
        self.sides: dict[str, list[Consumer]] = {}
        for side in sides:
            self.sides.setdefault(side.operand.node.name, []).append(side)
        after, before = reach(s.operand.node for s in sides), _ancestors(looked_at)
        graph = sides[0].operand.node.graph
        self.nodes = [n for n in graph.nodes if n.name in after and n.name in before and n.op == "call_function"]
        inside = {n.name for n in self.nodes}
        self.consumers = [n for n in self.nodes if n.name in self.sides]
        self.frontier = {s.name for n in self.nodes for s in n.all_input_nodes if s.name not in inside}
        # a linear layer all of whose inputs are dense: its masked output is the dense one less a few columns
        self.short = {
            n.name
            for n in self.consumers
            if len(self.sides[n.name]) == 1
            and _multiplies_a_matrix(self.sides[n.name][0])
            and not inside & {s.name for s in n.all_input_nodes}
        }
        self.frontier |= self.short


class DenseRun:
    """One batch through the dense graph, keeping what the suffixes read.

    program   captured with a symbolic batch, or every removal runs alone (``symbolic``)
    keep      names of values to keep
    """

    def __init__(self, program: Program, batch: Batch, keep: set[str]) -> None:
        self.program, self.batch = program, batch
        self.axes: Axes = program.need("axes")
        self.batch_axes = batch_axes(program)
        self.flat = program.flatten(batch.args, batch.kwargs)
        self.samples, self.sizes = samples_in(self.flat), sizes_in(program, self.flat)
        self.nodes = {n.name: n for n in program.graph.nodes}
        self.module = program.exported.graph_module
        self.values: dict[str, Any] = {}
        self.largest = 1
        sizes = [n for n in program.graph.nodes if n.op == "call_function" and op_name(n) == "sym_size"]
        self._sized = reach(sizes)
        self._data = reach((n for n in program.placeholders() if n.name in program.user_inputs), but=sizes)
        self._run(keep)

    @torch.no_grad()
    def _run(self, keep: set[str]) -> None:
        program, needed = self.program, _ancestors([self.nodes[name] for name in keep])
        values = dict(zip((n.name for n in program.placeholders()), program.arguments(self.flat), strict=True))
        self.given = values
        order = [n for n in program.graph.nodes if n.name in needed]
        last = {s.name: i for i, n in enumerate(order) for s in n.all_input_nodes}
        env: dict[str, Any] = {}
        for i, node in enumerate(order):
            if node.op == "placeholder":
                env[node.name] = values[node.name]
                continue
            env[node.name] = value = evaluate(node, env, self.module)
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel() * value.element_size())
            for source in node.all_input_nodes:
                if last[source.name] == i and source.name not in keep:
                    env.pop(source.name, None)
        self.values = {name: value for name, value in env.items() if name in keep} | values

    # ------------------------------------------------------------ stacking

    def batch_dim(self, name: str, item: int | None = None) -> int | None:
        """The dimension along which copies of the batch can be laid end to end; None for a value without samples.

        Raises Unstackable where samples are not the outermost factor of one dimension, or cannot be told.
        """
        dims, val = self.axes.dims.get(name), self.nodes[name].meta.get("val")
        if item is not None:
            dims, val = (dims[item] if dims is not None else None), val[item]
        if not isinstance(val, Tensor):
            return None
        found = [i for i, d in enumerate(dims or ()) if self.batch_axes & set(atoms(d))]
        symbolic = [i for i, size in enumerate(val.shape) if _depends(size, self._symbols())]
        if symbolic != found or len(found) > 1:
            raise Unstackable(f"it cannot be told where {name} holds the samples")
        if dims is not None and found and atoms(dims[found[0]])[0] not in self.batch_axes:
            raise Unstackable(f"{name} does not hold the samples outermost")
        return found[0] if found else None

    def stackable(self, suffix: Suffix) -> None:
        """Raise Unstackable where what ``suffix`` masks or reads cannot be laid side by side."""
        for name in suffix.frontier:
            value = self.nodes[name].meta.get("val")
            for i in range(len(value)) if isinstance(value, list | tuple) else (None,):
                self.batch_dim(name, i)
        for side in (s for sides in suffix.sides.values() for s in sides):
            if side.operand.sampled is None:
                raise Unstackable(f"{side.operand.node.name} sums over something that has no samples")

    def symbolic(self) -> bool:
        """Whether the graph was captured for any batch size."""
        return bool(self._symbols())

    def _symbols(self) -> set[str]:
        made = self.axes.stand_ins
        return set[str]().union(*(made.symbols(axis.size) for axis in self.batch_axes))

    def stack(self, node: Node, copies: int, made: dict[str, Any]) -> Any:
        """The dense value of ``node`` for ``copies`` copies of the batch. ``made`` holds those already there.

        Sizes, and constants made from them alone, are computed afresh; what depends on data is repeated.
        """
        if node.name in made:
            return made[node.name]
        if node.name in self._data or node.name not in self._sized or copies == 1:
            value = self._repeat_value(node, copies)
        elif op_name(node) == "sym_size":
            value = self._size(node, copies)
        else:
            for source in node.all_input_nodes:
                self.stack(source, copies, made)
            value = evaluate(node, made, self.module)
        made[node.name] = value
        return value

    def _size(self, node: Node, copies: int) -> int:
        source, position = node.args[0], int(node.args[1])  # type: ignore[arg-type]
        assert isinstance(source, Node)
        size = self.real(source.meta["val"].shape[position])
        return size * copies if self.batch_dim(source.name) == position else size

    def real(self, size: int | SymInt) -> int:
        """A captured size in this batch; in the example where only values say it."""
        return size_at(size, self.sizes, self.axes.stand_ins.real(size))

    def _repeat_value(self, node: Node, copies: int) -> Any:
        if node.name in self.given:
            value = self.given[node.name]
        elif node.name in self.values:
            value = self.values[node.name]
        else:  # a constant on the way to a size
            return evaluate(node, {s.name: self._repeat_value(s, 1) for s in node.all_input_nodes}, self.module)
        if copies == 1:
            return value
        if isinstance(value, list | tuple):
            return [self._repeat(t, self.batch_dim(node.name, i), copies) for i, t in enumerate(value)]
        if not isinstance(value, Tensor) or node.name not in self._data:
            return value
        return self._repeat(value, self.batch_dim(node.name), copies)

    @staticmethod
    def _repeat(value: Any, dim: int | None, copies: int) -> Any:
        return value if dim is None else torch.cat([value] * copies, dim)

    # ------------------------------------------------------------ removals

    @torch.no_grad()
    def remove(
        self, suffix: Suffix, group: PruneGroup, variants: Sequence[Tensor], keep: Mapping[str, bool]
    ) -> dict[str, Any]:
        """Values by name when in copy i of the batch the elements ``variants[i]`` of ``group`` do not contribute.

        keep   names wanted -> True for what the node reads once masked, False for its value

        Returns only what the removals move; everything else is as in the dense run.
        """
        copies, made, found = len(variants), dict[str, Any](), dict[str, Any]()
        last = {s.name: i for i, n in enumerate(suffix.nodes) for s in n.all_input_nodes}
        for i, node in enumerate(suffix.nodes):
            if node.name in suffix.short and not keep.get(node.name, False):
                made[node.name] = self._shorten(node, suffix, group, variants)
            else:
                for source in node.all_input_nodes:
                    self.stack(source, copies, made)
                mask = Masking(suffix.sides.get(node.name, ()), group, variants)
                made[node.name] = evaluate(node, made, self.module, mask)
                if keep.get(node.name, False):
                    found[f"{node.name} reads"] = mask.read
            for source in node.all_input_nodes:
                if last[source.name] == i and source.name not in keep:
                    made.pop(source.name, None)
        inside = {n.name for n in suffix.nodes}
        return found | {name: made[name] for name in keep if name in made and name in inside}

    def _shorten(self, node: Node, suffix: Suffix, group: PruneGroup, variants: Sequence[Tensor]) -> Tensor:
        """``x W^T - x[.., i] W[:, i]^T`` per variant: no product with the rest."""
        (side,) = suffix.sides[node.name]
        x, weight, position = self._linear(node)
        dense = self.values[node.name]
        label = elements(side.operand, x, group.axis)
        parts = []
        for chosen in variants:
            index = torch.isin(label, chosen).nonzero().flatten()
            if not len(index):
                parts.append(dense)
                continue
            parts.append(dense - x.index_select(position, index) @ weight.index_select(1, index).T)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.batch_dim(node.name) or 0)

    def _linear(self, node: Node) -> tuple[Tensor, Tensor, int]:
        """Input, weight [out, in] and the input's last dimension."""
        one, args = product(node), bind(node)
        assert one is not None
        x, weight = (self.values[args[name].name] for name in (one.left, one.right))
        return x, weight.T if one.form == "transposed" else weight, x.dim() - 1

    @torch.no_grad()
    def dead(self, suffix: Suffix, group: PruneGroup, size: int) -> Tensor:
        """[size] True for elements whose removal changes nothing at any consumer: what they score is exactly zero."""
        alive = torch.zeros(size, dtype=torch.bool)
        for node in suffix.consumers:
            for side in suffix.sides[node.name]:
                source = operand_source(side)
                if source.name not in self.values:
                    return torch.zeros(size, dtype=torch.bool)
                x = self.values[source.name]
                label = elements(side.operand, x, group.axis)
                rest = [d for d in range(x.dim()) if d != side.operand.position]
                moves = x.ne(0).any(rest) if rest else x.ne(0)
                if node.name in suffix.short:
                    moves = moves & self._linear(node)[1].ne(0).any(0)
                mine = label >= 0
                alive.index_put_((label[mine].cpu(),), moves[mine].cpu(), accumulate=True)
        return ~alive


class Unstackable(Exception):
    """Copies of the batch cannot be laid side by side in this program; the message says why."""


class Masking:
    """Zeroes elements in what a consumer reads, each variant's in its own copy of the batch."""

    def __init__(self, sides: Sequence[Consumer], group: PruneGroup, variants: Sequence[Tensor]) -> None:
        self.sides, self.group, self.variants = sides, group, variants
        self.read: Tensor | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for side in self.sides:
            operand = side.operand
            x = operand.value(args, kwargs).clone()
            label = elements(operand, x, self.group.axis)
            for i, chosen in enumerate(self.variants):
                part = x
                if len(self.variants) > 1:
                    if operand.sampled is None:
                        raise Unstackable(f"{operand.node.name} sums over something that has no samples")
                    each = x.shape[operand.sampled] // len(self.variants)
                    part = x.narrow(operand.sampled, i * each, each)
                part.index_fill_(operand.position, torch.isin(label, chosen).nonzero().flatten(), 0)
            args, kwargs = operand.put(args, kwargs, x)
            self.read = x
        return args, kwargs


def evaluate(
    node: Node,
    env: Mapping[str, Any],
    module: torch.nn.Module,
    change: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
) -> Any:
    """One node's value from those of its inputs; ``change`` may replace its arguments. Nothing is written in place."""
    if node.op == "get_attr":
        return getattr(module, str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n.name])
    if change is not None:
        args, kwargs = change(tuple(args), dict(kwargs))
    if is_mutable(node) and args and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])
    return guard_step(lambda n: n.target(*args, **kwargs), node)


def _multiplies_a_matrix(side: Consumer) -> bool:
    """Whether the consumer is ``x W^T`` or ``x W`` with a matrix W, and sums over x."""
    one = product(side.operand.node)
    if one is None or one.form not in ("linear", "transposed") or side.operand.path != one.left:
        return False
    weight = bind(side.operand.node)[one.right]
    return isinstance(weight, Node) and len(weight.meta["val"].shape) == 2


def _ancestors(nodes: Sequence[Node]) -> set[str]:
    found: set[str] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.name not in found:
            found.add(node.name)
            pending += node.all_input_nodes
    return found


def _depends(size: int | SymInt, symbols: set[str]) -> bool:
    return isinstance(size, SymInt) and bool(symbols & {str(s) for s in size.node.expr.free_symbols})


def copies_that_fit(run: DenseRun, memory: int) -> int:
    """How many copies of a batch may run side by side within ``memory`` bytes."""
    return max(1, math.floor(memory / (FOOTPRINT * run.largest)))
