"""The second moments that choose a basis: of the factors over the data, or of weights where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ....data.batch import Batch, Calibration
from ....ir.axis import Axis, atoms
from ....ir.dataflow import MOVES, ROW_NORMS, behind_views, bind, family, goes_to, product, row_weight
from ....ir.program import Program
from ....ir.signature import batch_axes, padding_mask
from ....process.ranks import mine
from ..recovery.moments import Moments
from ..recovery.shared import share_moments
from ..recovery.stream import Stream
from .sites import Side, Site
from .stored import Store

ROWS = 8192
"""Rows of a layer that are taken per batch, at most; where there are more they are thinned out evenly."""
ROUNDING = 1e-5
"""Keys of a sample that differ by no more than this share of their size are alike."""


def of_weights(side: Side, store: Store, centred: bool) -> list[Tensor]:
    """Grams of the factor, by head, where its layer reads white noise: behind a norm what the norm makes of that, its
    weight and its bias. Of a layer that ``reads`` the factor where all that it gives counts alike.

    centred   leave out what is the same in every row
    """
    value, mean = side.vectors(store).read(store.tensors), torch.zeros(0)
    if not side.reads:
        scale, shift = _behind_norm(side, store)
        mean = value @ shift if shift is not None else torch.zeros(len(value), dtype=torch.float64)
        shifts = side.shifts(store)
        mean = mean if shifts is None else mean + shifts.read(store.tensors)
        value = value if scale is None else value * scale
        value = value if centred else torch.cat([value, mean[:, None]], 1)
    return [sum((value[rows] @ value[rows].T for rows in head), torch.zeros(())) for head in side.rows]


def _behind_norm(side: Side, store: Store) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) of the norm of rows that the layer reads, where there is one, and they fit. [in] fp64 each"""
    source, found = behind_views(_read(side.node), MOVES), list[Tensor | None]()
    inputs = side.weight.meta["val"].shape[0 if side.form == "transposed" else 1]
    for name in ("weight", "bias"):
        part = bind(source).get(name) if family(source) in ROW_NORMS and side.form != "conv" else None
        stored = store.trace(part) if isinstance(part, Node) else None
        fits = stored is not None and tuple(stored.place.shape) == (inputs,)
        found.append(stored.read(store.tensors) if stored is not None and fits else None)
    return found[0], found[1]


@torch.no_grad()
def of_data(program: Program, sites: Sequence[Site], data: Calibration) -> list[list[list[Tensor] | None]]:
    """Grams over the data, of every site and side by head; None for the weight that reads values, whose gram needs no
    data, and for all heads where no row was seen.

    Memory   of one batch, what is alive at one point of the graph and the factors of one attention; 8 d^2 bytes per
             head
    """
    gathered = [[None if s.reads else _Gathered(s) for s in site.sides] for site in sites]
    for site, both in zip(sites, gathered, strict=True):
        if site.sides[0].reads:  # values are weighed behind attention: by what the layer that closes it reads
            both[1] = _Gathered(site.sides[0])
    collector = _Collector(program, sites)
    for number in mine(len(data.batches)):
        collector.add(data.batches[number], gathered)
    return [[None if one is None else one.grams() for one in both] for both in gathered]


class _Gathered:
    """Moments of one factor, by head."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.moments = [Moments() for _ in side.rows]

    def add(self, x: Tensor, w: Tensor) -> None:
        """Rows x [n, outputs of the layer (inputs where it reads)], weights w [n]."""
        for head, moments in zip(self.side.rows.to(x.device), self.moments, strict=True):
            for rows in head:
                moments.add(x[:, rows], x.new_zeros(len(x), 0), w)

    def grams(self) -> list[Tensor] | None:
        """[d, d] by head; about the mean where a bias can make up for it."""
        width = self.side.rows.shape[-1]
        shared = [share_moments(m, width, 0) for m in self.moments]
        if not all(m.rows for m in shared):
            return None
        return [m.finish(self.side.reads and self.side.bias is not None).g for m in shared]


@dataclass(frozen=True)
class _Need:
    """The values that one factor's rows are taken from: the layer's own, or what it reads and what weighs its rows."""

    value: str
    target: str = ""
    norm: str = ""
    eps: float = 0.0


class _Collector:
    """One run of the graph per batch; every site takes its rows when all that it needs has been computed."""

    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        self.program, self.axes = program, program.need("axes")
        self.place = {n.name: i for i, n in enumerate(program.graph.nodes)}
        self.batch: set[Axis] = batch_axes(program)
        self.tensors = {k: program.tensors[v].detach() for k, v in program.tensor_of_placeholder.items()}
        self.needs = [self._needs(site) for site in sites]
        last = [max(self.place[n] for need in needs if need for n in _names(need)) for needs in self.needs]
        self.order = sorted(range(len(sites)), key=last.__getitem__)
        self.last, self.sites = last, sites

    def _needs(self, site: Site) -> list[_Need | None]:
        found: list[_Need | None] = []
        for side in site.sides:
            found.append(None if side.reads else _Need(side.node.name))
        if site.sides[0].reads:
            node = site.sides[0].node
            _, target, norm, eps = goes_to(node, self.program.tensor_of_placeholder)
            found[1] = _Need(_read(node).name, target, norm, eps)
        return found

    def add(self, batch: Batch, gathered: Sequence[Sequence[_Gathered | None]]) -> None:
        flat = self.program.flatten(batch.args, batch.kwargs)
        mask = padding_mask(self.program, flat)
        stream = Stream(self.program.exported.graph_module, self.tensors, flat)
        wanted = [name for needs in self.needs for need in needs if need for name in _names(need)]
        stream.held |= set(wanted)
        for number in self.order:
            stream.advance(self.last[number] + 1)
            for side, (need, into) in enumerate(zip(self.needs[number], gathered[number], strict=True)):
                if need is None or into is None:
                    continue
                centred = side == self.sites[number].keys
                into.add(*self._rows(stream, need, into.side, mask, batch.size, centred))
                for name in _names(need):
                    wanted.remove(name)
                    if name not in wanted:
                        stream.release(name)

    def _rows(
        self, stream: Stream, need: _Need, side: Side, mask: Tensor | None, samples: int, centred: bool
    ) -> tuple[Tensor, Tensor]:
        value: Tensor = stream.values[need.value]
        x = value.movedim(1, -1) if side.form == "conv" else value
        lead = x.shape[:-1]
        w = torch.ones(lead, dtype=torch.float32, device=x.device)
        if need.norm:
            weight = row_weight(need.norm, need.eps, stream.values[need.target])
            w = w * weight.reshape(lead) if weight.numel() == w.numel() else w
        if mask is not None and mask.shape == lead:
            w = w * mask.to(w)
        if centred:
            x = self._centre(x.float(), w, need.value, samples, side.form == "conv")
        x, w = x.reshape(-1, x.shape[-1]), w.reshape(-1)
        step = -(-len(x) // ROWS) | 1  # odd: an even step would meet the same columns of every picture row
        return (x[::step], w[::step]) if len(x) > ROWS else (x, w)

    def _centre(self, x: Tensor, w: Tensor, name: str, samples: int, conv: bool) -> Tensor:
        """Keys less the mean of those of their sample (of their window, where windows are samples by then): a softmax
        does not see what is added to all keys."""
        dims = list(self.axes.dims[name])
        if conv:
            dims.append(dims.pop(1))
        at = next((i for i, dim in enumerate(dims[:-1]) if self.batch & set(atoms(dim))), None)
        if x.dim() == 2 and at == 0 and atoms(dims[0])[0] in self.batch and len(x) % samples == 0:
            x, w = x.view(samples, -1, x.shape[-1]), w.view(samples, -1)
        over = [i for i in range(w.dim()) if i != at]
        if not over:
            return x
        total = w.sum(over, keepdim=True).clamp_min(1e-12)
        left = x - ((x * w[..., None]).sum(over, keepdim=True) / total[..., None])
        seen = w[..., None] > 0  # of a single key rounding is left, which is no direction
        alike = float((left * seen).abs().amax()) <= ROUNDING * float((x * seen).abs().amax())
        return torch.zeros_like(left) if alike else left


def _names(need: _Need) -> list[str]:
    return [name for name in (need.value, need.target if need.norm else "") if name]


def _read(node: Node) -> Node:
    """What a layer reads."""
    one = product(node)
    assert one is not None
    source = bind(node)[one.left]
    assert isinstance(source, Node)
    return source
