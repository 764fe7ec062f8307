"""Dense values as the reduced graph sees them: the same tokens merged, a row for each that is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Graph, Node

from ....ir.axis import leaves
from ....ir.dataflow import op_name
from ....ir.token_flow import TokenFlow
from ....ops.library import OPS
from .sites import Site, Sites

if TYPE_CHECKING:
    from .stream import Stream


class Reduction:
    """The token ops of the reduced graph, applied to values of the dense one.

    Every op is linear in what it reduces, once it is decided which tokens go where. The decisions are those of the
    reduced run: its metrics, scores and sizes stand in for the dense ones, so that a row of the dense stream is the
    mean of the tokens that the reduced run merged into the row it is compared with.
    """

    def __init__(self, flow: TokenFlow, graph: Graph) -> None:
        self.flow = flow
        index = {s.value: i for i, s in enumerate(flow.sites) if s.usable}
        self.ops: list[tuple[int, Node]] = []
        for node in graph.nodes:
            if (
                op_name(node) in OPS
                and node.args
                and isinstance(node.args[0], Node)
                and node.args[0].name in index
                and isinstance(node.meta["val"], tuple | list)
            ):
                self.ops.append((index[node.args[0].name], node))
        self.held = {n.name for _, node in self.ops for n in node.all_input_nodes if n is not node.args[0]}
        first = self.ops[0][0] if self.ops else len(flow.sites)
        self.changed = {name for name, i in flow.region.items() if i >= first}

    def __call__(self, name: str, value: Any, pruned: Stream) -> Any:
        """The dense ``value`` of node ``name`` with the tokens reduced that are by then. As it is elsewhere."""
        if not isinstance(value, Tensor) or not self.flow.holds_rows(name):
            return value
        for i, node in self.ops:
            if i <= self.flow.region[name]:
                rest = [pruned.values[a.name] if isinstance(a, Node) else a for a in node.args[1:]]
                value = node.target(value, *rest)[0]  # type: ignore[operator]
        return value

    def fitting(self, found: Sites) -> Sites:
        """The sites whose rows can be compared; others are left out with the reason."""
        kept, skipped = [], dict(found.skipped)
        for site in found.sites:
            why = self._unfit(site)
            if why:
                skipped[site.node] = why
            else:
                kept.append(site)
        return Sites(tuple(kept), skipped)

    def _unfit(self, site: Site) -> str:
        region = self.flow.region
        if site.target not in self.changed:
            return "its tokens are reduced before its sum" if site.node in self.changed else ""
        if region.get(site.node) != region[site.target]:
            return "its tokens are reduced before its sum"
        axes, axis = self.flow.axes, self.flow.sites[region[site.target]].axis
        assert axes is not None
        holds = any(axis in set(leaves(d)) for d in axes.dims[site.target])
        return "" if not holds or self.flow.holds_rows(site.target) else "its tokens do not lie in rows"
