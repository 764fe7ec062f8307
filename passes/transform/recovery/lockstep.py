"""The dense and the pruned graph run side by side over the calibration data, layer by layer, each prefix once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ....data.batch import Batch
from ....ir.axes import Axes
from ....ir.axis import Keep
from ....ir.dataflow import bind, row_weight
from ....ir.patches import unfold
from ....ir.program import Program
from ....ir.signature import padding_mask
from .depthwise import ChannelMoments, sample_rows
from .moments import Moments
from .reduction import Reduction
from .shared import share_moments
from .sites import Site, align
from .stream import Stream

ROWS = 8192
"""Rows of a layer that are taken per batch, at least: where there are more, they are thinned out evenly. Neighbouring
pixels and tokens say nearly the same."""
PER_INPUT = 16  # rows over all batches per input of the layer, at least
POSITIONS = 4 * ROWS
"""Output positions of all pictures together that a convolution is fitted to at least: neighbours are alike, and what
they cost is the greater part of recovery."""
PER_CHANNEL = 4096  # of a depthwise convolution, whose channels have a few unknowns each


class Lockstep:
    """Both graphs over all batches. Costs one run of each plus the products at the sites.

    Memory: of every batch, what is alive at one point of the two graphs (for a transformer a few residual streams).
    ``tensors`` are the pruned graph's by placeholder; replace entries to change the weights from there on.

    batches   this process's share (with several processes every one walks the same sites in the same order)
    reduction   how tokens of dense values are merged before they are compared, where the pruned graph merges some
    readout   rows that the last sum's reader selects count T/4 times as much (see ``Site.read``)
    """

    def __init__(
        self,
        dense: Program,
        pruned: Program,
        keep: Keep,
        batches: Sequence[Batch],
        sites: Sequence[Site],
        readout: bool = False,
        reduction: Reduction | None = None,
    ) -> None:
        self.axes: Axes = dense.need("axes")
        self.keep, self.readout, self.reduction = keep, readout, reduction
        self.place = {n.name: i for i, n in enumerate(pruned.graph.nodes)}
        self.nodes = {n.name: n for n in pruned.graph.nodes}
        self.tensors = {k: pruned.tensors[v].detach() for k, v in pruned.tensor_of_placeholder.items()}
        whole = {k: dense.tensors[v].detach() for k, v in dense.tensor_of_placeholder.items()}
        self.runs = []
        for batch in batches:
            flat = dense.flatten(batch.args, batch.kwargs)
            one, two = (Stream(p.exported.graph_module, t, flat) for p, t in ((dense, whole), (pruned, self.tensors)))
            one.held |= {name for s in sites for name in self._wants(s)}
            two.held |= set() if reduction is None else reduction.held
            self.runs.append((one, two, padding_mask(dense, flat)))
        self.wanted = [name for s in sites for name in self._wants(s)]

    @torch.no_grad()
    def collect(self, site: Site, products: bool = True) -> Moments:
        """Bring both graphs to ``site`` and gather its moments over all batches of all processes."""
        moments = Moments(products)
        for dense, pruned, mask in self.runs:
            dense.advance(max(dense.cursor, dense.place[site.target] + 1))
            pruned.advance(pruned.place[site.start])
            for c, r, w in self._rows(site, dense, pruned, mask):
                moments.add(c, r, w)
        self.leave(site)
        return share_moments(moments, *self.size(site))

    @torch.no_grad()
    def collect_by_channel(self, site: Site) -> ChannelMoments:
        """:meth:`collect` for a depthwise convolution."""
        weight = self.tensors[site.weight]
        moments = ChannelMoments(len(weight), weight[0].numel())
        for dense, pruned, _ in self.runs:
            dense.advance(max(dense.cursor, dense.place[site.target] + 1))
            pruned.advance(pruned.place[site.start])
            node = pruned.nodes[pruned.place[site.start]]
            target = align(self._reduce(dense, pruned, site.target), self.axes.dims[site.target], self.keep)
            missing = target - pruned.run(node)
            most = -(-PER_CHANNEL // len(self.runs))
            c, (r,) = sample_rows(node, weight.shape[2:], _read_by(site, pruned, node), [missing], most)
            moments.add(c, r)
        self.leave(site)
        return moments

    def leave(self, site: Site) -> None:
        """Done with ``site``: what was held for it alone may go."""
        for name in self._wants(site):
            self.wanted.remove(name)
            for dense, _, _ in self.runs if name not in self.wanted else ():
                dense.release(name)

    def size(self, site: Site) -> tuple[int, int]:
        """(inputs, outputs) of the layer as it is now."""
        if site.empty:
            return 0, self.tensors[site.bias].numel() if site.bias else 0
        weight = self.tensors[site.weight]
        outputs = weight.shape[1 if site.form == "transposed" else 0]
        return weight.numel() // outputs, outputs

    def _wants(self, site: Site) -> list[str]:
        return [site.target, *self._late(site)]

    def _late(self, site: Site) -> list[str]:
        """What joins the output on its path although it is computed after the layer (parallel branches)."""
        inside, start = {site.start, *site.path}, self.place[site.start]
        sources = dict.fromkeys(s.name for name in site.path for s in self.nodes[name].all_input_nodes)
        return [s for s in sources if s not in inside and self.place[s] > start]

    def _rows(
        self, site: Site, dense: Stream, pruned: Stream, mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        node = pruned.nodes[pruned.place[site.start]]
        whole = self._reduce(dense, pruned, site.target)
        target = align(whole, self.axes.dims[site.target], self.keep)
        out = pruned.run(node)
        missing, weight = self._pull_back(site, dense, pruned, out, target, self._row_weight(site, whole))
        if site.form == "conv" and out.dim() == 4 and not site.empty:
            yield self._picture_rows(site, pruned, node, missing, weight)
            return
        channel = 1 if site.form == "conv" else out.dim() - 1
        r = missing.movedim(channel, -1).reshape(-1, out.shape[channel])
        w = weight.movedim(channel, -1).reshape(r.shape).amax(-1)
        if mask is not None and mask.numel() == len(w) and site.form != "conv":
            w = w * mask.reshape(-1).to(w)
        if site.empty:
            yield r.new_zeros(len(r), 0), r, w
            return
        c = self._inputs(site, pruned, node)
        most = max(ROWS, PER_INPUT * c.shape[1] // len(self.runs))
        if len(c) > most:
            step = -(-len(c) // most) | 1  # odd: an even step would meet the same columns of every picture row
            c, r, w = c[::step], r[::step], w[::step]
        yield c, r, w

    def _picture_rows(
        self, site: Site, pruned: Stream, node: Node, missing: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of a convolution of pictures, from a grid of positions."""
        kernel = self.tensors[site.weight].shape
        most = -(-max(POSITIONS, PER_INPUT * kernel[1:].numel()) // len(self.runs))
        c, (r, w) = sample_rows(node, kernel[2:], _read_by(site, pruned, node), [missing, weight], most)
        return c.flatten(1), r, w.amax(-1)

    def _inputs(self, site: Site, pruned: Stream, node: Node) -> Tensor:
        """What the layer reads, one row per output row. [n, k]"""
        x = _read_by(site, pruned, node)
        if site.form != "conv":
            return x.reshape(-1, x.shape[-1])
        return unfold(node, self.tensors[site.weight].shape[2:], x)

    def _pull_back(
        self, site: Site, dense: Stream, pruned: Stream, out: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what ``out`` would have to gain, weights), both in the shape of the layer's output.

        The path is out -> A out + rest with A a scaled permutation (or less), so ``A^T A`` is diagonal and the change
        wanted is ``A^T (target - now) / (A^T A)``; A^T comes from differentiating the path, whatever its ops.
        """
        weight, late = weight.expand_as(target), self._late(site)
        if not site.path:
            return target - out, weight
        with torch.enable_grad():
            leaf = out.detach().requires_grad_()
            seen: dict[str, Any] = {site.start: leaf}
            for name in site.path:
                node = pruned.nodes[pruned.place[name]]
                for source in node.all_input_nodes:
                    if source.name in late:  # not there yet: the dense value stands in
                        seen[source.name] = self._dense_value(dense, pruned, source.name)
                seen[name] = pruned.run(node, seen)
            now = seen[site.path[-1]]
            ones = torch.ones_like(now)
            gains = [
                torch.autograd.grad(now, leaf, v.to(now), retain_graph=True)[0]
                for v in (ones, target - now.detach(), weight)
            ]
        scale, gap, pulled = gains
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return gap / safe.square(), torch.where(scale == 0, torch.zeros_like(scale), pulled / safe)

    def _row_weight(self, site: Site, z: Tensor) -> Tensor:
        """1 / (what the norm divides by)^2 per row: errors that the norm shrinks count less. Like z, last size 1, or []

        With ``readout``, the position that the last sum's reader selects counts T/4 times as much.
        """
        weight = row_weight(site.norm, site.eps, z)
        if self.readout and site.read is not None:
            factor = weight.new_ones(1, z.shape[1], 1)
            factor[:, site.read] = max(z.shape[1] / 4, 1.0)
            weight = weight * factor
        return weight

    def _reduce(self, dense: Stream, pruned: Stream, name: str) -> Any:
        value = dense.values[name]
        return value if self.reduction is None else self.reduction(name, value, pruned)

    def _dense_value(self, dense: Stream, pruned: Stream, name: str) -> Any:
        value = self._reduce(dense, pruned, name)
        return align(value, self.axes.dims[name], self.keep) if isinstance(value, Tensor) else value


def _read_by(site: Site, pruned: Stream, node: Node) -> Tensor:
    """The value that the layer at ``node`` reads."""
    source = bind(node)[site.operand]
    assert isinstance(source, Node)
    value: Tensor = pruned._value(source, {})
    return value
