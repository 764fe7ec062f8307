"""``MergeTokens``: put the plan's token reduction into the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ... import registry
from ...errors import OptionError
from ...ir.axis import Axis, Dim
from ...ir.dataflow import Family, bind, family
from ...ir.pipeline import Transform
from ...ir.plan import CompressionPlan, TokenPlan
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild
from ...ir.token_flow import TokenFlow, TokenSite, counts_behind, patches_of
from .reducers.reducer import Reducer, Taps
from .resize import edit_literal, propagate

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeTokens(Transform):
    """Reduce tokens behind every site that the plan names, and tell what reads them from there on.

    Per site one op (x, metric.., size) -> (x', size', place); everything that read x reads x'. Behind it
    * constants that hold the token count are recomputed;
    * attention over merged tokens counts each as often as it stands for: ``softmax(q k^T + log size)``, an additive
      mask, so that fused attention stays fused;
    * averages over tokens become averages weighted by size;
    * where all tokens are needed again (``unmerge``), each comes back as the one that took it in.
    Counts are constants of the graph; the batch stays open. The plan without its tokens is handed on: its groups are
    found again by name on the new graph.
    Needs ``tokens`` and ``plan``. A plan without tokens, or with none to remove, leaves the program as it is.
    Raises PlanError for a site that is not there or frozen, or a count beyond what the reducer can do.
    """

    needs = ("tokens", "plan")

    def run(self, program: Program) -> Program:
        plan, flow = program.need("plan"), program.need("tokens")
        wanted = plan.tokens
        if wanted is None or wanted.empty:
            return program
        return program.without_facts(exported=_Rewrite(program, flow, wanted, self.slug()).export())


def trial(program: Program, plan: TokenPlan, reducer: Reducer | None = None) -> GraphModule:
    """The graph that :class:`MergeTokens` would make, to be run and thrown away: no shapes are propagated through it,
    which takes seconds, and nothing is verified. It takes the arguments of ``program``. ``reducer``: in place of the
    plan's."""
    if plan.empty:
        return program.exported.graph_module
    module = _Rewrite(program, program.need("tokens"), plan, "trial", reducer).graph_module()[0]
    module.graph.lint()
    module.recompile()
    return module


def reducer_of(text: str) -> Reducer:
    """The reducer that ``tome{option=value}`` names. Raises OptionError with the nearest name."""
    made: Reducer = registry.reducer(text)
    return made


@dataclass
class _Region:
    """What reads see behind a site: sizes, and the place of every original token, once there are any."""

    size: Node | None = None
    place: Node | None = None


class _Rewrite:
    def __init__(
        self, program: Program, flow: TokenFlow, plan: TokenPlan, made_by: str, reducer: Reducer | None = None
    ) -> None:
        self.program, self.flow, self.plan, self.made_by = program, flow, plan, made_by
        self.reducer = reducer or reducer_of(plan.reducer)
        self.behind = counts_behind(flow, plan, self.reducer)
        self.walk = program.need("axes").dims if program.axes is not None else {}
        if flow.restored and not self.reducer.merges:
            raise OptionError(
                f"'{self.reducer.name}' drops tokens: they cannot be restored",
                where="--unmerge",
                cure="use `--tokens tome` or `--tokens transform`",
            )

    def export(self) -> torch.export.ExportedProgram:
        """With every shape propagated and held against the one the axes predict."""
        module, counts, edited = self.graph_module()
        assert self.flow.axes is not None
        propagate(module, self.flow.axes, counts, {}, edited)
        return rebuild(self.program.exported, module)

    def graph_module(self) -> tuple[GraphModule, dict[Axis, int], set[str]]:
        """(the rewritten graph, tokens that are left by axis, nodes whose constants were edited)."""
        module = copy_graph(self.program.exported)
        self.graph: Graph = module.graph
        self.nodes = {n.name: n for n in self.graph.nodes}
        sites = self.flow.sites
        counts = {s.axis: self.behind[s.name] - s.protected for s in self.flow.usable if s.axis is not None}
        regions = self._reduce()
        axes = self.flow.axes
        assert axes is not None
        edited = set()
        for literal in axes.literals:
            if literal.node in self.flow.region and edit_literal(
                module, self.nodes[literal.node], literal, counts, self.made_by
            ):
                edited.add(literal.node)
        for name, dim in self.flow.softmaxes.items():
            size = regions[self.flow.region[name]].size
            if size is not None and self.reducer.weighs:
                self._weigh(self.nodes[name], dim, size, sites[self.flow.region[name]])
        for name in self.flow.averages:
            size = regions[self.flow.region[name]].size
            if size is not None and self.reducer.weighs:
                self._average(self.nodes[name], size, sites[self.flow.region[name]])
        for source, reader in self.flow.restored:
            place = regions[self.flow.region.get(source, -1)].place if source in self.flow.region else None
            if place is not None:
                self._restore(self.nodes[source], self.nodes[reader], place, sites[self.flow.region[source]])
        return module, counts, edited

    # ------------------------------------------------------------ reduction
    def _reduce(self) -> dict[int, _Region]:
        """Insert an op at every site that loses tokens. Region index -> what readers there see."""
        now, regions = _Region(), {}
        for i, site in enumerate(self.flow.sites):
            if site.usable:
                r = self.plan.removed.get(site.name, 0)
                if r:
                    now = self._at(site, r, now)
                regions[i] = now
        return regions

    def _at(self, site: TokenSite, r: int, now: _Region) -> _Region:
        taps = Taps(self.graph, self.nodes, site, now.size, self.behind[site.name] + r, self.made_by)
        readers = list(taps.x.users)
        node = self.reducer.reduce(taps, r)
        fewer = taps.emit(operator.getitem, node, 0)
        for reader in readers:
            reader.replace_input_with(taps.x, fewer)
        size = taps.emit(operator.getitem, node, 1) if self.reducer.merges else None
        if not self.flow.restored:
            return _Region(size)
        place = taps.emit(operator.getitem, node, 2)
        return _Region(size, place if now.place is None else taps.emit(aten.gather.default, place, 1, now.place))

    # ------------------------------------------------------------ readers
    def _emit(self, before: Node, target: Any, *args: Any) -> Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        node.meta.update(stack_trace=before.meta.get("stack_trace"), fxprune_pass=self.made_by)
        return node

    def _sizes(self, before: Node, dim: Dim, size: Node, site: TokenSite) -> Node:
        """Sizes of a dim that holds the tokens: with more in front of them, or without the protected ones. [b, n, 1]"""
        front = patches_of(dim)[1] - site.protected
        if front > 0:
            ones = self._emit(before, aten.ones_like.default, self._emit(before, aten.slice.Tensor, size, 1, 0, front))
            return self._emit(before, aten.cat.default, [ones, size], 1)
        return size if not front else self._emit(before, aten.slice.Tensor, size, 1, -front)

    def _weigh(self, node: Node, position: int, size: Node, site: TokenSite) -> None:
        args = bind(node)
        fused = family(node) is Family.ATTENTION
        source = args["key"] if fused else args["self"]
        dim = self.walk[source.name][-2 if fused else position]
        log = self._emit(node, aten.log.default, self._sizes(node, dim, size, site))  # [b, n, 1]
        row = self._emit(node, aten.unsqueeze.default, log, 1)  # [b, 1, n, 1]
        bias = row if not fused and position == 2 else self._emit(node, aten.transpose.int, row, 2, 3)
        if not fused:
            node.replace_input_with(source, self._emit(node, aten.add.Tensor, source, bias))
            return
        node.args = tuple(args[n] for n in ("query", "key", "value"))
        node.kwargs = {
            **{
                k: v
                for k, v in args.items()
                if k in ("dropout_p", "is_causal", "scale", "enable_gqa") and v not in (None, 0.0, False)
            },
            "attn_mask": bias,
        }

    def _average(self, node: Node, size: Node, site: TokenSite) -> None:
        """mean(x) -> sum(size x) / sum(size), and sum(x) -> sum(size x), over the tokens."""
        args = bind(node)
        source, keep = args["self"], bool(args.get("keepdim", False))
        weight = self._sizes(node, self.walk[source.name][1], size, site)
        total = self._emit(node, aten.sum.dim_IntList, self._emit(node, aten.mul.Tensor, source, weight), [1], keep)
        if family(node) is Family.MEAN:
            total = self._emit(node, aten.div.Tensor, total, self._emit(node, aten.sum.dim_IntList, weight, [1], keep))
        node.replace_all_uses_with(total)
        self.graph.erase_node(node)

    def _restore(self, source: Node, reader: Node, place: Node, site: TokenSite) -> None:
        from ...ops.restore import RESTORE

        front = patches_of(self.walk[source.name][1])[1]
        if front != site.protected:  # the patches alone: none of them went into a protected token
            place = self._emit(reader, aten.slice.Tensor, place, 1, site.protected)
            place = self._emit(reader, aten.sub.Scalar, place, site.protected)
        reader.replace_input_with(source, self._emit(reader, RESTORE.target, source, place))


def without_tokens(plan: CompressionPlan) -> CompressionPlan:
    """The plan's groups alone: what is left to do once tokens are reduced. No file says so any more."""
    return replace(plan.with_tokens(None), source=None)
