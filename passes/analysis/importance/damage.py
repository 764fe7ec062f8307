"""What a change of a few layers does to the model's output, measured: only what lies behind the change is run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ....data.batch import Batch
from ....data.memory import share
from ....ir.axis import kept_index
from ....ir.example_sizes import runtime_sizes
from ....ir.group import PruneGroup
from ....ir.program import Program
from ....ir.signature import samples_in
from .consumers import Consumer, consumers
from .distance import output_change
from .objective import Target, targets

HELD = 2**28  # bytes of dense outputs that are kept, where no budget says less


@dataclass(frozen=True)
class Change:
    """A group cut to ``keep`` [size] bool, and new tensors for some placeholders."""

    group: PruneGroup
    keep: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Damage:
    """The dense outputs of some batches, and how far changed ones are from them.

    Logits: mean of KL(dense || changed). Other outputs: half the mean squared deviation of each sample's standardised
    output, less the mean deviation over all samples, which tells no two samples apart.
    """

    def __init__(self, program: Program, batches: Sequence[Batch]) -> None:
        self.program, self.batches = program, list(batches)
        self.sides: dict[str, list[Consumer]] = {}
        for side in consumers(program):
            for group in side.groups:
                self.sides.setdefault(group.name, []).append(side)

    @torch.no_grad()
    def of(self, changes: Sequence[Change]) -> list[float]:
        """The damage of each change. All must concern the same group, whose readers are where the run begins."""
        if not changes:
            return []
        sides = self.sides[changes[0].group.name]
        starts = {s.operand.node.name for s in sides}
        starts |= {n.name for c in changes for p in c.tensors for n in self._placeholder(p).users}
        again = _behind(self.program, starts)
        sums: list[list[_Deviation]] = [[] for _ in changes]
        for batch in self.batches:
            flat = self.program.flatten(batch.args, batch.kwargs)
            dense = _Dense(self.program, again)
            want = targets(self.program, list(dense.run(*self.program.arguments(flat))), batch, samples_in(flat))
            sizes = runtime_sizes(self.program, flat)
            for change, found in zip(changes, sums, strict=True):
                run = _Again(self.program, dense.kept, again, change, sides, sizes)
                got = targets(self.program, list(run.outputs()), batch, samples_in(flat))
                found.append(_Deviation.between(got, want))
        return [_Deviation.mean(found) for found in sums]

    def _placeholder(self, name: str) -> Node:
        return next(n for n in self.program.placeholders() if n.name == name)


def _behind(program: Program, starts: set[str]) -> set[str]:
    """Names of the starts and of every node that one of them reaches."""
    found = set(starts)
    for node in program.graph.nodes:
        if any(source.name in found for source in node.all_input_nodes):
            found.add(node.name)
    return found


class _Dense(Interpreter):
    """One dense run that keeps what the nodes ``again`` read from before them."""

    def __init__(self, program: Program, again: set[str]) -> None:
        super().__init__(program.exported.graph_module)
        self.needed = {
            s.name for n in program.graph.nodes if n.name in again for s in n.all_input_nodes if s.name not in again
        }
        self.kept: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.needed:
            self.kept[n.name] = value
        return value


class _Again(Interpreter):
    """Runs the nodes ``again`` with a change in place."""

    def __init__(
        self,
        program: Program,
        kept: Mapping[str, Any],
        again: set[str],
        change: Change,
        sides: Sequence[Consumer],
        sizes: Mapping[int, int],
    ) -> None:
        super().__init__(program.exported.graph_module)
        self.nodes = [n for n in self.graph.nodes if n.name in again]
        # the interpreter reads its environment by node: nodes of its own copy of the graph, found by name
        by_name = {n.name: n for n in self.graph.nodes}
        self.env = {by_name[k]: change.tensors.get(k, v) for k, v in kept.items()}
        self.change, self.sizes = change, sizes
        self.masked: dict[str, list[Consumer]] = {}
        for side in sides:
            self.masked.setdefault(side.operand.node.name, []).append(side)

    def outputs(self) -> Sequence[Any]:
        for node in self.nodes:
            if node.op == "output":
                return list(self.run_node(node))
            self.env[node] = self.run_node(node)
        return []

    def run_node(self, n: Node) -> Any:
        if n.name not in self.masked:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        index = torch.nonzero(self.change.keep)[:, 0]
        for side in self.masked[n.name]:
            x = side.operand.value(args, kwargs)
            position = side.operand.position % x.dim()
            kept = kept_index(side.operand.dims[side.operand.position], {self.change.group.axis: index}, self.sizes)
            mask = x.new_zeros(x.shape[position])
            mask[kept.to(x.device)] = 1
            masked = x * mask.view([-1 if i == position else 1 for i in range(x.dim())])
            args, kwargs = side.operand.put(args, kwargs, masked)
        return getattr(self, n.op)(n.target, args, kwargs)


class Reference:
    """What the dense program makes of batches, for comparing several others with it: every batch is run once.

    What was seen is kept as long as it fits ``most`` bytes (by default a share of the memory budget); batches beyond
    are run again, with the same result. A batch is known by its identity: give the same objects again.
    """

    def __init__(self, program: Program, most: int | None = None) -> None:
        self.program = program
        self.most = share(HELD, 0.1) if most is None else most
        self.used = 0
        self._kept: dict[int, tuple[Batch, list[Target]]] = {}

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[Target]:
        """The dense outputs of one batch, as the criteria look at them."""
        if id(batch) in self._kept:
            return self._kept[id(batch)][1]
        flat = self.program.flatten(batch.args, batch.kwargs)
        outputs = Interpreter(self.program.exported.graph_module).run(*self.program.arguments(flat))
        found = targets(self.program, list(outputs), batch, samples_in(flat))
        size = sum(t.value.untyped_storage().nbytes() for t in found)
        if self.used + size <= self.most:
            self.used += size
            self._kept[id(batch)] = batch, found  # the batch itself, so that no other one gets its id
        return found


@torch.no_grad()
def divergences(dense: Program | Reference, other: Program | GraphModule, batches: Sequence[Batch]) -> Tensor:
    """How far the outputs of ``other``, a program with the same inputs and outputs, are from the dense ones.

    dense   the program, or what is kept of its outputs where several are compared with it
    other   may be a graph alone, to be run with the arguments of the dense program
    Returns one value per sample, in order. [samples] float64
    """
    known = dense if isinstance(dense, Reference) else Reference(dense, 0)
    program = known.program
    graph, given = (other, program) if isinstance(other, GraphModule) else (other.exported.graph_module, other)
    found = []
    for batch in batches:
        flat = program.flatten(batch.args, batch.kwargs)
        outputs = Interpreter(graph).run(*given.arguments(flat))
        now = targets(program, list(outputs), batch, samples_in(flat))
        found.append(_Deviation.between(now, known.targets(batch)))
    return _Deviation.each(found)


def divergence(dense: Program | Reference, other: Program | GraphModule, batches: Sequence[Batch]) -> float:
    """The mean of :func:`divergences`."""
    return float(divergences(dense, other, batches).mean())


@dataclass(frozen=True)
class _Deviation:
    """Of one batch: every sample's KL [samples], or how far its other outputs moved, [samples, d] each."""

    kl: Tensor
    rows: tuple[Tensor, ...]

    @staticmethod
    def between(now: Sequence[Target], was: Sequence[Target]) -> _Deviation:
        samples = len(was[0].value)
        if was[0].logits:
            return _Deviation(output_change(now, was, 1.0).double(), ())
        moved = []
        for a, b in zip(now, was, strict=True):
            each, count = b.count((a.value - b.value).double())
            moved.append(each.reshape(samples, -1) / count.double().sqrt()[:, None])
        return _Deviation(torch.zeros(samples, dtype=torch.float64), tuple(moved))

    @staticmethod
    def each(parts: Sequence[_Deviation]) -> Tensor:
        """Of every sample of every batch. [samples]"""
        total = torch.cat([p.kl.reshape(-1) for p in parts])
        for i in range(len(parts[0].rows)):
            e = [p.rows[i] for p in parts]
            if len({r.shape[1] for r in e}) == 1:
                whole = torch.cat(e)
                e = [whole - whole.mean(0)]  # outputs of open length have no mean over the samples of several batches
            total = total + 0.5 * torch.cat([r.square().sum(1) for r in e]).to(total)
        return total

    @staticmethod
    def mean(parts: Sequence[_Deviation]) -> float:
        """Over all samples of all batches."""
        return max(float(_Deviation.each(parts).mean()), 0.0)
