"""The basis of a stream in which its first directions hold most of what is read of it."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Calibration
from ....ir.dataflow import bind, product
from ....ir.program import Program
from ....ir.signature import padding_mask
from ....process.ranks import add_up, mine
from .rewrite import Folded


def principal_basis(folded: Folded, data: Calibration) -> tuple[Tensor, Tensor]:
    """(orthonormal columns, the share of energy along each), in the order of falling energy. [D, D], [D] fp64

    Of the second moments of the rows that the stream's readers see behind a norm, without padding, every norm weighted
    alike: rows that are not normalised first would all be those few of massive activations. Where a reader sees one
    token only, or their mean, that is the row. The largest entry of each column is positive.

    Raises FloatingPointError where the moments are not finite.
    """
    program = folded.program
    taps = _taps(folded)
    width = folded.uses.axis.size
    total = torch.zeros(width, width, dtype=torch.float64)
    for number in mine(len(data.batches)):
        batch = data.batches[number]
        flat = program.flatten(batch.args, batch.kwargs)
        found = _Moments(program, taps, padding_mask(program, flat))
        with torch.no_grad():
            found.run(*program.arguments(flat))
        total += found.total.to(total) * batch.size / data.samples
    total = add_up({"moments": total})["moments"]
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError("what the norms read is not finite")
    energy, basis = torch.linalg.eigh((total + total.T) / 2)
    energy, basis = energy.flip(0).clamp_min(0), basis.flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign(), energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _taps(folded: Folded) -> dict[str, tuple[float, bool]]:
    """Name of a reader -> (what its rows weigh, whether a norm made them); of readers of one tensor the first speaks
    for all."""
    nodes = {n.name: n for n in folded.program.graph.nodes}
    by_norm: dict[str, dict[Node, str]] = collections.defaultdict(dict)
    for reader, (_, norm) in folded.uses.readers.items():
        by_norm[norm].setdefault(_operand(nodes[reader]), reader)
    return {
        reader: (1 / (len(by_norm) * len(readers)), bool(norm))
        for norm, readers in by_norm.items()
        for reader in readers.values()
    }


def _operand(node: Node) -> Node:
    one = product(node)
    assert one is not None
    source: Any = bind(node)[one.left]
    assert isinstance(source, Node)
    return source


class _Moments(Interpreter):
    """Runs the graph and adds up the weighted mean of x x^T over the rows of every tapped reader."""

    def __init__(self, program: Program, taps: Mapping[str, tuple[float, bool]], mask: Tensor | None) -> None:
        super().__init__(program.exported.graph_module)
        self.taps, self.mask, self.total = taps, mask, torch.zeros((), dtype=torch.float64)

    def run_node(self, n: Node) -> Any:
        if n.name in self.taps:
            self._add(n, self.env[_operand(n)], *self.taps[n.name])
        return super().run_node(n)

    def _add(self, node: Node, x: Tensor, weight: float, normed: bool) -> None:
        one = product(node)
        x = x.movedim(1, -1) if one is not None and one.form == "conv" else x
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            x = x[self.mask.to(x.device)]
        rows = x.reshape(-1, x.shape[-1]).float()
        if not normed:
            rows = rows * rows.square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
        if len(rows):
            self.total = self.total + weight / len(rows) * (rows.T @ rows).double().cpu()
