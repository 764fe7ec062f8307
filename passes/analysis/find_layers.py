"""``FindLayers``: what is added to a residual stream, and whole layers, as parts that are there or not."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.fx import Node

from ...ir.axes import Axes
from ...ir.axis import Axis
from ...ir.cost import with_macs
from ...ir.dataflow import MOVES, Family, family_of, op_name, ops_in
from ...ir.group import Kind, PruneGroup, Switch
from ...ir.norms import row_norms
from ...ir.pipeline import Analysis
from ...ir.program import Program
from .residual import ancestors

SUMS = ops_in(Family.ADD) - {"sub", "subtract", "rsub"}
ALONG = MOVES | {Family.CAST, Family.COPY, Family.SAME}
"""What leaves a stream the stream it was."""
SPEAKING = ((Kind.HEAD, Kind.KV, Kind.FFN, Kind.CHANNEL), (Kind.EXPERT,), (Kind.V, Kind.QKV, Kind.QK))
"""Kinds whose elements are together what a layer is; the first of these that it has say what it is worth."""


@dataclass(frozen=True)
class FindLayers(Analysis):
    """Add residual branches and whole layers to the program's groups.

    A branch is ``f`` in ``x + f(x)``, with all that only it needs, the norm in front of it included: of kind
    ``attention`` where activations are multiplied with one another, else ``mlp``. What is added at once by both, side
    by side, is a layer, and each of the two a branch. Layers (kind ``layer``) are attentions that follow each other on
    a stream with the branch behind them, and branches with convolutions. Where one is gone, the sum is what it was
    before; of a post-norm layer its norms go as well, of a post-norm branch they stay.

    Needs ``axes`` and ``groups``, gives ``groups`` with the parts at their end, in the order of the graph.
    """

    needs = ("axes", "groups")
    gives = ("groups",)

    def run(self, program: Program) -> Program:
        known = [g for g in program.need("groups") if str(g.kind) not in (Kind.ATTENTION, Kind.MLP, Kind.LAYER)]
        found = _Finder(program, known).parts()
        return with_macs(program.but(groups=(*known, *found)))


@dataclass(frozen=True)
class _Branch:
    """What ``add`` adds to ``kept``; ``parts`` are (node, what it is without the part) of the branches inside."""

    add: Node
    kept: Node
    inside: frozenset[Node]
    kind: Kind
    parts: tuple[tuple[Node, Node], ...] = ()


@dataclass
class _Finder:
    program: Program
    groups: Sequence[PruneGroup]
    bound: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        program, axes = self.program, self.axes
        self.bound, self.axes_of = program.tensor_of_placeholder, axes.dims
        self.before, self.number = ancestors(program)
        self.nodes = list(program.graph.nodes)
        self.forms = collections.defaultdict[str, set[str]](set)
        for product in axes.matmuls:
            self.forms[product.node].add(product.form)
        self.norm_of = {norm.node: norm.source for norm in row_norms(program.graph)}
        self.norm_behind = {norm.source: norm.node for norm in row_norms(program.graph)}

    @property
    def axes(self) -> Axes:
        found: Axes = self.program.need("axes")
        return found

    def parts(self) -> list[Switch]:
        """All parts, in the order of the graph."""
        branches = self._branches()
        found = list[tuple[Kind, Node, Node]]()
        for layer in self._layers(branches):
            for branch in layer:
                if branch.kind is not Kind.LAYER:
                    found.append((branch.kind, branch.add, branch.kept))
                found += [(self._kind(self._only(*part)), *part) for part in branch.parts]
            if len(layer) > 1 or layer[0].kind is Kind.LAYER:
                found.append((Kind.LAYER, self._end(layer), layer[0].kept))
        return self._name_parts(found)

    # ------------------------------------------------------------ branches

    def _branches(self) -> list[_Branch]:
        """Innermost residual branches, in the order of the graph."""
        found: dict[Node, _Branch] = {}
        for node in self.nodes:
            if node.op != "call_function" or op_name(node) not in SUMS:
                continue
            for branch in self._at(node, found):
                if not any(inner in branch.inside for inner in found):
                    found[node] = branch
                    break
        return list(found.values())

    def _at(self, add: Node, known: Mapping[Node, _Branch]) -> Iterator[_Branch]:
        sides = [a for a in add.args[:2] if isinstance(a, Node)]
        for end, kept in (sides, sides[::-1]) if len(sides) == 2 else ():
            if end is kept or end.op != "call_function" or not _alike(add, kept):
                continue
            if not any(self._reads(end, stream) for stream in self._stream(kept, known)):
                continue
            inside = self._only(add, kept)
            if end in inside and self._multiplies(inside):
                parts = tuple(self._side_by_side(end))
                kind = Kind.LAYER if parts else self._kind(inside)
                yield _Branch(add, kept, inside, kind, parts)

    def _stream(self, kept: Node, known: Mapping[Node, _Branch]) -> list[Node]:
        """The stream as it was before the sums that end in ``kept``: parallel branches read it there."""
        found = [kept]
        while found[-1] in known:
            found.append(known[found[-1]].kept)
        return found

    def _side_by_side(self, end: Node) -> Iterator[tuple[Node, Node]]:
        """(the sum of two branches that one addition adds, the one without the other)"""
        sides = [a for a in end.args[:2] if isinstance(a, Node)] if op_name(end) in SUMS else []
        pairs = [(end, other) for other in sides] if len(sides) == 2 and len(end.users) == 1 else []
        if all(_alike(*pair) and self._multiplies(self._only(*pair)) for pair in pairs):
            yield from pairs

    def _reads(self, end: Node, stream: Node) -> bool:
        return bool(self.before[end] >> self.number[stream] & 1)

    def _only(self, behind: Node, earlier: Node) -> frozenset[Node]:
        """What ``behind`` alone needs, and ``earlier`` does not."""
        inside = {behind}
        own = self.before[earlier]
        for node in reversed(self.nodes[: self.number[behind]]):
            if node.users and inside.issuperset(node.users) and not own >> self.number[node] & 1:
                inside.add(node)
        return frozenset(n for n in inside if n is not behind and n.name not in self.program.user_inputs)

    def _multiplies(self, inside: frozenset[Node]) -> bool:
        """Whether weights are multiplied inside: else it is an activation or a gate written out."""
        return any(self.forms.get(n.name, set()) - {"matmul"} for n in inside)

    def _kind(self, inside: frozenset[Node]) -> Kind:
        forms = set[str]().union(*(self.forms.get(n.name, set()) for n in inside))
        if any("conv" in form for form in forms) and "matmul" not in forms:
            return Kind.LAYER
        return Kind.ATTENTION if "matmul" in forms else Kind.MLP

    # ------------------------------------------------------------ layers

    def _layers(self, branches: Sequence[_Branch]) -> list[list[_Branch]]:
        """Runs of branches on one stream: attentions, and what follows them."""
        found = list[list[_Branch]]()
        for branch in branches:
            last = found[-1][-1] if found else None
            follows = last is not None and self._source(branch.kept) is last.add and last.kind is Kind.ATTENTION
            if follows and not branch.parts:  # with a convolution in it as well
                kind = Kind.MLP if branch.kind is Kind.LAYER else branch.kind
                found[-1].append(replace(branch, kind=kind))
            else:
                found.append([branch])
        return found

    def _source(self, node: Node) -> Node:
        """The sum that a stream comes from, through norms and what only moves it."""
        while node.op == "call_function":
            inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            if node in self.norm_of:
                node = self.norm_of[node]
            elif family_of(op_name(node)) in ALONG and len(inputs) == 1:
                node = inputs[0]
            else:
                break
        return node

    def _end(self, layer: Sequence[_Branch]) -> Node:
        """What the layer makes of the stream: its last sum, or the norm behind it where norms are on the stream."""
        last = layer[-1].add
        post = self.norm_of.get(layer[-1].kept) is layer[0].add if len(layer) > 1 else False
        norm = self.norm_behind.get(last)
        return norm if post and norm is not None and set(last.users) == {norm} and _alike(norm, last) else last

    # ------------------------------------------------------------ names

    def _name_parts(self, found: Sequence[tuple[Kind, Node, Node]]) -> list[Switch]:
        insides = [self._only(behind, earlier) for _, behind, earlier in found]
        stems = [self._stem(inside) for inside in insides]
        several = collections.Counter((str(kind), stem) for (kind, *_), stem in zip(found, stems, strict=True))
        taken: collections.Counter[str] = collections.Counter()
        parts = []
        for (kind, behind, earlier), inside, stem in zip(found, insides, stems, strict=True):
            own = self._last(inside) if several[str(kind), stem] > 1 or not stem else stem
            name = f"{own}:{kind}"
            taken[name] += 1
            number = taken[name]
            name += f"#{number}" if number > 1 else ""
            names = frozenset(n.name for n in inside)
            shares = self._shares(names)
            parts.append(
                Switch(
                    name=name,
                    kind=kind,
                    axis=Axis(1, str(kind)),
                    inside=names,
                    past=((behind.name, earlier.name),),
                    shares=shares,
                    frozen="" if shares else "nothing in it has a score",
                )
            )
        return parts

    def _weights(self, inside: frozenset[Node]) -> list[str]:
        """Names of the matrices that products inside read, in the order of the graph."""
        read = (s for n in self.nodes if n in inside and self.forms.get(n.name) for s in n.all_input_nodes)
        return [self.bound[s.name] for s in read if s.name in self.bound]

    def _stem(self, inside: frozenset[Node]) -> str:
        """The module that holds them all."""
        modules = [name.split(".")[:-1] for name in self._weights(inside)]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
        return ".".join(parts[0] for parts in shared)

    def _last(self, inside: frozenset[Node]) -> str:
        weights = self._weights(inside)
        return weights[-1].rpartition(".")[0] if weights else next(iter(sorted(n.name for n in inside)))

    def _shares(self, inside: frozenset[str]) -> tuple[str, ...]:
        live = [g for g in self.groups if g.prunable and not g.members and g.within(inside)]
        for kinds in SPEAKING:
            if chosen := tuple(g.name for g in live if str(g.kind) in map(str, kinds)):
                return chosen
        return ()


def _alike(one: Node, two: Node) -> bool:
    """Whether one value may stand for the other."""
    a, b = one.meta.get("val"), two.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape)
