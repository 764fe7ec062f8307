"""``FindTokenSites``: behind which attention layers tokens may become fewer, and what reads them from there on."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...errors import spell
from ...ir.axes import Axes, Matmul
from ...ir.axis import Axis, Dim, atoms, total
from ...ir.dataflow import ELEMENTWISE, ROW_NORMS, Family, bind, family, op_name
from ...ir.group import Kind
from ...ir.pipeline import Analysis
from ...ir.program import Program
from ...ir.token_flow import Positional, Swap, TokenFlow, TokenSite, patches_of
from .attentions import MOVES, _Attention, _dims, _is_layer, _is_weighed, _open, _Reach, _right, _stream

"""Ops that keep every token whole, wherever they put it."""
OVER_OTHERS = ROW_NORMS | {Family.NORM, Family.EXTREME}
"""Ops over other dims than tokens (a maximum over tokens is one over fewer of them)."""
AVERAGES = (Family.MEAN, Family.SUM)
INDEXES = (Family.PICK, Family.PART)
ALIKE = MOVES | ELEMENTWISE | OVER_OTHERS | {Family.PRODUCT}
"""Ops that treat all tokens alike."""


@dataclass(frozen=True)
class FindTokenSites(Analysis):
    """One :class:`TokenSite` per self-attention, in graph order; frozen ones say why.

    A site is usable when everything behind it treats all tokens alike: its attention sees all of them, position
    embeddings were added before, and nothing that is computed from what it reduces meets a table, a window or a value
    that knows tokens by where they stand. That is read off the dims of the walk, not off module names.

    unmerge  heads that need every token (dense prediction, models that return their tokens) get them back: where
             something reads tokens by position, or the graph returns them, all are restored on that edge
    Needs ``axes``, gives ``tokens``. Which stream of tokens, where there are several: the one most attentions look at.
    """

    unmerge: bool = False
    needs = ("axes",)
    gives = ("tokens",)

    def run(self, program: Program) -> Program:
        return program.but(tokens=_Finder(program, self.unmerge).flow())


class _TokensMustStay(Exception):
    """Why the tokens of a value must stay, and the place of the node that wants it."""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(why)
        self.place = place


class _Finder:
    def __init__(self, program: Program, unmerge: bool) -> None:
        self.program, self.unmerge = program, unmerge
        self.axes: Axes = program.need("axes")
        self.nodes = list(program.graph.nodes)
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.contracted: dict[str, list[Dim]] = collections.defaultdict(list)
        for c in self.axes.contractions:
            self.contracted[c.node].append(c.dim)
        self.statistics: dict[str, list[Dim]] = collections.defaultdict(list)
        for s in self.axes.statistics:
            self.statistics[s.node].append(s.dim)

    def flow(self) -> TokenFlow:
        found = list(self._attentions())
        usual = collections.Counter(_stream(a.dim) for a in found if not _open(a.dim)).most_common(1)
        if not usual:
            why = "the number of tokens is open"
            return TokenFlow(tuple(self._frozen(a, why) for a in found), unmerge=self.unmerge)
        self.stream = usual[0][0]
        self.swap = Swap(self.stream, Axis(total(self.stream)))
        self.holds = {n: any(self.swap.holds(d) for d in _dims(self.axes.dims.get(n.name))) for n in self.nodes}
        self.protected = self._count_protected(found)
        sites, reaches = [], []
        for attention, after in zip(found, [*found[1:], None], strict=True):
            site, reach = self._site(attention, after)
            sites.append(site)
            reaches.append(reach)
        return self._flow(sites, reaches)

    # ------------------------------------------------------------ attentions
    def _attentions(self) -> Iterator[_Attention]:
        """Every product of tokens with the same tokens that a softmax follows, in graph order."""
        facts: dict[str, list[Matmul]] = collections.defaultdict(list)
        for m in self.axes.matmuls:
            if m.form == "matmul":
                facts[m.node].append(m)
        for node in self.nodes:
            for m in facts.get(node.name, ())[:1]:
                if not atoms(m.m) or atoms(m.m) != atoms(m.n):
                    continue
                made = (
                    self._match_fused(node, m) if family(node) is Family.ATTENTION else self._explicit(node, m, facts)
                )
                if made is not None:
                    yield made

    def _match_fused(self, node: Node, fact: Matmul) -> _Attention:
        args = bind(node)
        width = args["query"].meta["val"].shape[-1]
        scale = args.get("scale")
        return _Attention(
            node,
            node,
            fact.n,
            args["query"],
            args["key"],
            args["value"],
            float(width) ** -0.5 if scale is None else float(scale),
        )

    def _explicit(self, scores: Node, fact: Matmul, facts: Mapping[str, list[Matmul]]) -> _Attention | None:
        """softmax(.. Q K^T ..) V, with anything in between that a softmax can be found behind."""
        behind, soft = {scores}, None
        for node in self.nodes[self.place[scores] + 1 :]:
            if not behind & set(node.all_input_nodes):
                continue
            behind.add(node)
            if (
                soft is None
                and family(node) is Family.SOFTMAX
                and atoms(self.axes.dims[node.name][bind(node)["dim"]]) == atoms(fact.n)
            ):
                soft, behind = node, {node}
            elif soft is not None and any(atoms(m.k) == atoms(fact.n) for m in facts.get(node.name, ())):
                values, key = _right(node), _right(scores)
                return _Attention(soft, node, fact.n, None, key, values)
        return None

    def _frozen(self, attention: _Attention, why: str) -> TokenSite:
        return TokenSite(self._name(attention), attention.node.name, tokens=total(attention.dim), frozen=why)

    def _name(self, attention: _Attention) -> str:
        """The module of the first layer behind the attention."""
        bound, behind = self.program.tensor_of_placeholder, {attention.product}
        for node in self.nodes[self.place[attention.product] + 1 :]:
            if behind & set(node.all_input_nodes):
                behind.add(node)
                if _is_layer(node):
                    for source in node.all_input_nodes:
                        while source.op == "call_function" and len(source.all_input_nodes) == 1:
                            source = source.all_input_nodes[0]
                        if source.name in bound and "weight" in bound[source.name]:
                            return f"{bound[source.name].rpartition('.')[0]}:{Kind.TOKEN}"
        return f"{attention.node.name}:{Kind.TOKEN}"

    def _count_protected(self, found: Iterable[_Attention]) -> int:
        """Tokens in front of the patches, wherever attention sees them beside it."""
        counts = [patches_of(a.dim)[1] for a in found if _stream(a.dim) == self.stream]
        return max(counts, default=0)

    # ------------------------------------------------------------ sites
    def _site(self, attention: _Attention, after: _Attention | None) -> tuple[TokenSite, _Reach | None]:
        """The first value behind the attention that everything later reads its tokens through."""
        if _open(attention.dim):
            return self._frozen(attention, "the number of tokens is open"), None
        if _stream(attention.dim) != self.stream:
            return self._frozen(
                attention, "it looks at other tokens than most attentions (windows, another stream)"
            ), None
        if patches_of(attention.dim)[1] != self.protected:
            return self._frozen(attention, "it sees other class tokens than most attentions"), None
        if bind(attention.node).get("is_causal"):
            return self._frozen(attention, f"causal attention at {attention.node.name}: later tokens are hidden"), None
        end = len(self.nodes) if after is None else self.place[after.node]
        behind, why, far = {attention.product}, "no value behind it holds all tokens as [batch, tokens, width]", -1
        for node in self.nodes[self.place[attention.product] + 1 : end]:
            if not behind & set(node.all_input_nodes):
                continue
            behind.add(node)
            if not self._is_token_value(node, attention.dim):
                continue
            try:
                reach = self._reach(node)
            except _TokensMustStay as told:  # the candidate that got farthest has the reason
                if told.place > far:
                    far, why = told.place, str(told)
                continue
            token = attention.dim
            query, key, values = (
                n.name if n is not None and self._tap(n, token, at) else ""
                for n, at in ((attention.query, (2,)), (attention.key, (2, 3)), (attention.values, (2,)))
            )
            return TokenSite(
                self._name(attention),
                attention.node.name,
                node.name,
                query,
                key,
                values,
                scale=attention.scale,
                transposed=bool(key) and not self._tap(attention.key, token, (2,)),
                tokens=total(token),
                mapped=self._tap(attention.node, token, (2,)) and attention.query is None,
                protected=self.protected,
            ), reach
        return self._frozen(attention, why), None

    def _is_token_value(self, node: Node, dim: Dim) -> bool:
        """Whether the value is [batch, tokens, width]."""
        dims = self.axes.dims.get(node.name)
        if not isinstance(node.meta.get("val"), Tensor) or not isinstance(dims, list) or len(dims) != 3:
            return False
        return atoms(dims[1]) == atoms(dim) and not self.swap.holds(dims[0]) and not self.swap.holds(dims[2])

    def _tap(self, node: Node | None, token: Dim, at: tuple[int, ...]) -> bool:
        """Whether a reducer can read heads off the value: [batch, heads, ..] with the tokens at one of ``at``."""
        dims = self.axes.dims.get(node.name) if node is not None else None
        if node is None or not isinstance(dims, list) or len(dims) != 4 or not node.meta["val"].is_floating_point():
            return False
        return any(atoms(dims[i]) == atoms(token) for i in at) and not any(self.swap.holds(d) for d in dims[:2])

    def _reach(self, value: Node) -> _Reach:
        """Everything that holds the tokens of ``value``. Raises _TokensMustStay with the node that tells them apart."""
        found = _Reach({value})
        for node in self.nodes[self.place[value] + 1 :]:
            carrying = [n for n in node.all_input_nodes if self.holds[n]]
            mine = [n for n in carrying if n in found.nodes]
            if not mine:
                continue
            if len(mine) != len(carrying):
                other = next(n for n in carrying if n not in found.nodes)
                raise _TokensMustStay(
                    self.place[node], f"it meets what holds all tokens as they stood at {node.name}: {other.name}"
                )
            try:
                self._read(node, found)
            except Positional as reason:
                if not self.unmerge or not all(self._restore(n, node, found) for n in mine):
                    cure = "" if self.unmerge or node.op != "output" else "; `--unmerge` restores them"
                    raise _TokensMustStay(self.place[node], f"{reason} at {node.name}{spell(cure)}") from None
                continue
            if self.holds[node]:
                found.nodes.add(node)
        return found

    def _restore(self, node: Node, reader: Node, found: _Reach) -> bool:
        """Restore the tokens that ``reader`` reads of ``node``, or further up where they lie in rows, or say False."""
        dims = self.axes.dims.get(node.name)
        rows = (
            isinstance(dims, list)
            and len(dims) == 3
            and isinstance(node.meta.get("val"), Tensor)
            and self.swap.holds(dims[1])
            and not self.swap.holds(dims[0])
            and not self.swap.holds(dims[2])
        )
        if rows:
            found.restored.append((node.name, reader.name))
            return True
        sources = [n for n in node.all_input_nodes if n in found.nodes]
        if len(sources) != 1 or family(node) not in MOVES or any(u in found.nodes for u in node.users):
            return False
        found.nodes.discard(node)
        return self._restore(sources[0], node, found)

    def _read(self, node: Node, found: _Reach) -> None:
        """Note how ``node`` reads tokens. Raises Positional unless it treats all alike."""
        if node.op == "output":
            raise Positional("the graph returns every token")
        name, does, args = op_name(node), family(node), bind(node)
        for dim in _dims(self.axes.dims.get(node.name)):
            self.swap(dim)
        if (
            any(self.swap.holds(d) for d in self.contracted.get(node.name, ()))
            and does not in (*AVERAGES, Family.ATTENTION)
            and not _is_weighed(node, found)
        ):
            raise Positional("a product sums over tokens")
        if any(self.swap.holds(d) for d in self.statistics.get(node.name, ())) and does not in AVERAGES:
            raise Positional(f"{name} over tokens")
        if does is Family.ATTENTION:
            key = self.axes.dims[args["key"].name]
            if args.get("is_causal"):
                raise Positional("causal attention")
            if self.swap.holds(key[-2]):
                self._weigh(args["key"], key[0])
                found.softmaxes[node.name] = len(key) - 1
        elif does is Family.SOFTMAX:
            dims = self.axes.dims[args["self"].name]
            if self.swap.holds(dims[args["dim"]]):
                self._weigh(args["self"], dims[0])
                found.softmaxes[node.name] = args["dim"] % len(dims)
        elif does in AVERAGES:
            source = self.axes.dims[args["self"].name]
            over = [i for i, d in enumerate(source) if self.swap.holds(d)]
            gone = args.get("dim")
            wanted = {d % len(source) for d in (gone if isinstance(gone, list | tuple) else [gone])} if gone else set()
            if wanted & set(over):
                if len(over) != 1 or len(wanted) != 1 or len(source) != 3 or over != [1]:
                    raise Positional(f"{name} over tokens and other dims")
                found.averages[node.name] = 1
        elif does in INDEXES:
            self._index(node, name, args)
        elif does in ALIKE:
            if does is Family.EXTREME and len(node.all_input_nodes) == 1 and args.get("dim") is None:
                raise Positional(f"{name} over everything")
        else:
            raise Positional(f"there is no token rule for {name}")

    def _weigh(self, source: Node, batch: Dim) -> None:
        """An attention mask needs the batch as a dimension of its own."""
        if len(self.axes.dims[source.name]) != 4:
            raise Positional("heads are folded into the batch")

    def _index(self, node: Node, name: str, args: Mapping[str, Any]) -> None:
        source = self.axes.dims[args["self"].name]
        dim = args["dim"] % len(source)
        if not self.swap.holds(source[dim]):
            return
        out, before = self.axes.dims[node.name], patches_of(source[dim])[1]
        if name == "select":
            index = args["index"]
            if not isinstance(index, int) or not 0 <= index < before:
                raise Positional("one token is picked")
        elif name == "slice" and isinstance(out, list):
            if not self.swap.holds(out[dim]):
                end = args.get("end")
                if not isinstance(end, int) or not 0 <= end <= before or args.get("step", 1) != 1:
                    raise Positional("some tokens are picked")
        else:
            raise Positional(f"{name} of tokens")

    # ------------------------------------------------------------ flow
    def _flow(self, sites: list[TokenSite], reaches: list[_Reach | None]) -> TokenFlow:
        region: dict[str, int] = {}
        softmaxes: dict[str, int] = {}
        averages: dict[str, int] = {}
        restored: dict[tuple[str, str], None] = {}
        for i, (site, reach) in enumerate(zip(sites, reaches, strict=True)):
            if reach is None:
                continue
            axis = Axis(total(self.stream), "tokens")
            sites[i] = replace(site, axis=axis)
            region.update({n.name: i for n in reach.nodes if n.name != site.value})
            softmaxes.update(reach.softmaxes)
            averages.update(reach.averages)
            restored.update(dict.fromkeys(reach.restored))
            # what no longer holds tokens still sums over them
            region.update({n: i for n in (*reach.softmaxes, *reach.averages)})
        readers = {reader for _, reader in restored}
        region = {name: i for name, i in region.items() if name not in readers}
        for node in self.nodes:
            inner = [region[n.name] for n in node.all_input_nodes if n.name in region and self.holds[n]]
            if inner and node.op == "call_function" and node.name not in {*region, *readers}:
                region[node.name] = max(inner)
        return TokenFlow(
            tuple(sites),
            region,
            self._axes(sites, region),
            softmaxes,
            averages,
            tuple(restored),
            tuple(a.size for a in self.stream),
            self.unmerge,
        )

    def _axes(self, sites: list[TokenSite], region: Mapping[str, int]) -> Axes:
        """The walk's axes with the tokens of every region as an axis of its own."""
        swaps = {i: Swap(self.stream, s.axis) for i, s in enumerate(sites) if s.axis is not None}
        axes = self.axes

        def swap_dims(node: str, dims: Any) -> Any:
            swap = swaps.get(region.get(node, -1))
            if swap is None or dims is None:
                return dims
            if isinstance(dims, tuple):
                return swap(dims)
            return type(dims)(swap_dims(node, d) for d in dims)

        return replace(
            axes,
            dims={n: swap_dims(n, d) for n, d in axes.dims.items()},
            literals=tuple(replace(x, dims=tuple(swap_dims(x.node, d) for d in x.dims)) for x in axes.literals),
            matmuls=tuple(
                replace(
                    m,
                    batch=swap_dims(m.node, m.batch),
                    m=swap_dims(m.node, m.m),
                    k=swap_dims(m.node, m.k),
                    n=swap_dims(m.node, m.n),
                )
                for m in axes.matmuls
            ),
        )
