"""The basis of a stream in which its first directions hold most of what is read of it."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Calibration
from ....ir.axis import Axis
from ....ir.dataflow import bind, product
from ....ir.program import Program
from ....ir.signature import padding_mask
from ....process.ranks import add_up, mine
from .rewrite import Folded


def principal_bases(folded: Folded, data: Calibration) -> dict[Axis, tuple[Tensor, Tensor]]:
    """Stream -> (orthonormal columns, the share of energy along each), in the order of falling energy. [D, D], [D] fp64

    Of the second moments of the rows that the stream's readers see behind a norm, without padding, every norm weighted
    alike: rows that are not normalised first would all be those few of massive activations. Where a reader sees one
    token only, or their mean, that is the row. The largest entry of each column is positive.

    A stream whose moments are not finite has no basis.
    Cost   one run of the data; 16 D^2 bytes per stream
    """
    program, taps = folded.program, _taps(folded)
    totals = {one.axis: torch.zeros(one.axis.size, one.axis.size, dtype=torch.float64) for one in folded.uses}
    for number in mine(len(data.batches)):
        batch = data.batches[number]
        flat = program.flatten(batch.args, batch.kwargs)
        found = _Moments(program, taps, padding_mask(program, flat))
        with torch.no_grad():
            found.run(*program.arguments(flat))
        for axis, part in found.totals.items():
            totals[axis] += part * (batch.size / data.samples)
    added = add_up({str(i): total for i, total in enumerate(totals.values())})
    of_all = {axis: added[str(i)] for i, axis in enumerate(totals)}
    return {axis: _principal(moments) for axis, moments in of_all.items() if bool(torch.isfinite(moments).all())}


def _principal(moments: Tensor) -> tuple[Tensor, Tensor]:
    energy, basis = torch.linalg.eigh((moments + moments.T) / 2)
    energy, basis = energy.flip(0).clamp_min(0), basis.flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign(), energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class _Tap:
    """Of which stream a reader shows rows, what they weigh, whether a norm made them."""

    axis: Axis
    weight: float
    normed: bool


def _taps(folded: Folded) -> dict[str, _Tap]:
    """Name of a reader -> what is taken there; of readers of one tensor the first speaks for all."""
    nodes, taps = {n.name: n for n in folded.program.graph.nodes}, dict[str, _Tap]()
    for one in folded.uses:
        by_norm: dict[str, dict[Node, str]] = collections.defaultdict(dict)
        for reader, norm in one.readers.items():
            by_norm[norm].setdefault(_operand(nodes[reader]), reader)
        for norm, readers in by_norm.items():
            weight = 1 / (len(by_norm) * len(readers))
            taps.update((reader, _Tap(one.axis, weight, bool(norm))) for reader in readers.values())
    return taps


def _operand(node: Node) -> Node:
    one = product(node)
    assert one is not None
    source: Any = bind(node)[one.left]
    assert isinstance(source, Node)
    return source


class _Moments(Interpreter):
    """Runs the graph and adds up, by stream, the weighted mean of x x^T over the rows of every tapped reader."""

    def __init__(self, program: Program, taps: Mapping[str, _Tap], mask: Tensor | None) -> None:
        super().__init__(program.exported.graph_module)
        self.taps, self.mask, self.totals = taps, mask, dict[Axis, Tensor]()

    def run_node(self, n: Node) -> Any:
        if n.name in self.taps:
            self._add(n, self.env[_operand(n)], self.taps[n.name])
        return super().run_node(n)

    def _add(self, node: Node, x: Tensor, tap: _Tap) -> None:
        one = product(node)
        x = x.movedim(1, -1) if one is not None and one.form == "conv" else x
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            x = x[self.mask.to(x.device)]
        rows = x.reshape(-1, x.shape[-1]).float()
        if not tap.normed:
            rows = rows * rows.square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
        if len(rows):
            part = tap.weight / len(rows) * (rows.T @ rows).double().cpu()
            self.totals[tap.axis] = self.totals[tap.axis] + part if tap.axis in self.totals else part
