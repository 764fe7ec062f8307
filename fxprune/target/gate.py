"""The cost gate: a layer runs block-sparse only where a measured table says that it is faster than dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.linear_layers import Matrix, live_tiles, matrices
from ..ir.program import Program
from ..ir.sparsity import TWO_OF_FOUR, Tile, is_two_of_four, tile_areas
from .block_table import BlockTable
from .semi_structured import why_not

TILES: tuple[Tile, ...] = ((128, 64), (64, 64), (32, 32), (32, 16), (16, 32), (16, 16))
"""Tiles that are looked for in weights, and that the kernel has configurations for."""
WIN = 1.05  # measured ratio from which tiles run: a tie is not worth another kernel
AS_GOOD = 1.02  # a larger tile is taken where it holds no more than so many times what the best one holds


@dataclass(frozen=True)
class SparseLayer:
    """A layer whose weight holds zeros in tiles, found by looking at the weight and not at any plan.

    pattern  the tile, or ``2:4``;  live: where tiles hold something, [rows, columns] bool ([out, in] for 2:4)
    """

    matrix: Matrix
    pattern: str
    tile: Tile
    live: Tensor

    @property
    def density(self) -> float:
        """Share of the entries that live tiles cover."""
        if self.pattern == TWO_OF_FOUR:
            return float(self.live.float().mean())
        areas = tile_areas(self.matrix.shape, self.tile)
        return float(areas[self.live].sum()) / float(areas.sum())


@dataclass(frozen=True)
class Decision:
    """What was decided for one layer, and why.

    m         rows of the example inputs, all samples together
    sparse    whether it runs block-sparse;  ratio: measured, how much faster than dense, or None
    dense, effective, executed   multiply-accumulates of one sample: of the dense layer, of live tiles, of what runs
    """

    layer: SparseLayer
    m: int
    sparse: bool
    said: str
    ratio: float | None
    dense: int
    effective: int
    executed: int

    def record(self) -> dict[str, Any]:
        """As plain data for the report."""
        return {
            "parameter": self.layer.matrix.parameter,
            "pattern": self.layer.pattern,
            "density": round(self.layer.density, 4),
            "m": self.m,
            "sparse": self.sparse,
            "ratio": self.ratio,
            "said": self.said,
            "macs": {"dense": self.dense, "effective": self.effective, "executed": self.executed},
        }


def sparse_weights(program: Program) -> list[SparseLayer]:
    """Layers of the program with zeros in whole tiles, or with two zeros in every four inputs; tiles come first."""
    found = []
    for matrix in matrices(program):
        weight = matrix.matrix(program.tensors[matrix.parameter].detach())
        least = min(weight.numel() // 2, *(int(tile_areas(matrix.shape, tile).min()) for tile in TILES))
        if weight.numel() - int(weight.count_nonzero()) < max(least, 1):
            continue
        layers = [SparseLayer(matrix, f"{n}x{k}", (n, k), live_tiles(weight, (n, k))) for n, k in TILES]
        best = min(one.density for one in layers)
        if best < 1:
            found.append(next(one for one in layers if one.density <= AS_GOOD * best))
        elif is_two_of_four(weight):
            found.append(SparseLayer(matrix, TWO_OF_FOUR, (1, 1), weight != 0))
    return found


def decide(
    program: Program,
    table: BlockTable | None,
    device: str,
    multiplied: Callable[[SparseLayer], int] = lambda layer: int(layer.live.sum()),
) -> list[Decision]:
    """One decision per sparse layer, by the rows of the program's example inputs.

    device      where it will run, for the words when there is no table
    multiplied  how many tiles of a layer run; by default its live ones (a padded form multiplies more)
    """
    return [_decide_layer(program, layer, table, device, multiplied(layer)) for layer in sparse_weights(program)]


def keep_dense(program: Program, why: str) -> list[Decision]:
    """Decisions of a target that only knows dense weights."""
    return [
        _decision(layer, False, _pairs(program, layer) if layer.pattern == TWO_OF_FOUR else f"kept dense: {why}", None)
        for layer in sparse_weights(program)
    ]


def report(decisions: Sequence[Decision], table: BlockTable | None = None) -> dict[str, Any]:
    """Plain data: every decision, the sums over sparse layers, and the table that was believed."""
    if not decisions:
        return {}
    sums = {k: sum(getattr(d, k) for d in decisions) for k in ("dense", "effective", "executed")}
    return {
        "layers": [d.record() for d in decisions],
        "macs": sums,
        "table": None if table is None else {"device": table.device, "form": table.form, "date": table.date},
    }


def describe_executed(told: Mapping[str, Any], gate: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """The entries of an artefact's report that the target's decisions change: ``sparsity`` and ``notes``.

    told    the report so far;  gate: what :func:`report` made;  notes: what :func:`words` made
    """
    if not gate:
        return {"notes": list(dict.fromkeys([*told.get("notes", ()), *notes]))} if notes else {}
    before = {k: v for k, v in told.get("sparsity", {}).items() if k != "gate"}
    whole = told["cost"]["compressed"]["flops"]
    sums = gate["macs"]
    flops = before.get(
        "flops", {"dense": told["cost"]["dense"]["flops"], "effective": whole - sums["dense"] + sums["effective"]}
    )
    flops = {**flops, "executed": whole - sums["dense"] + sums["executed"]}
    earlier = [n for n in told.get("notes", ()) if not n.startswith(("kept dense: ", "block-sparse: "))]
    return {"sparsity": {**before, "flops": flops, "gate": dict(gate)}, "notes": [*earlier, *notes]}


def words(decisions: Iterable[Decision]) -> list[str]:
    """What happened, a line per reason with the number of layers."""
    by_reason: dict[str, list[str]] = {}
    for d in decisions:
        by_reason.setdefault(d.said, []).append(d.layer.matrix.parameter)
    return [
        f"{said} ({len(names)} layer{'s' * (len(names) > 1)}, such as {names[0]})" for said, names in by_reason.items()
    ]


def _decide_layer(program: Program, layer: SparseLayer, table: BlockTable | None, device: str, tiles: int) -> Decision:
    if layer.pattern == TWO_OF_FOUR:
        return _decision(layer, False, _pairs(program, layer), None)
    if table is None:
        return _decision(layer, False, f"kept dense: no table was measured for {device}", None)
    matrix = layer.matrix
    dtype = str(program.tensors[matrix.parameter].dtype).removeprefix("torch.")
    (n, k), m = matrix.shape, matrix.rows * matrix.batch
    timing = table.find(n, k, layer.pattern, dtype, m, tiles / layer.live.numel())
    if timing is None:
        return _decision(
            layer,
            False,
            f"kept dense: {n}x{k} in tiles of {layer.pattern} at M={m} in {dtype} is not in the table of {table}",
            None,
        )
    ratio, at = round(timing.ratio, 2), f"at M={m} (table of {table})"
    if timing.ratio < WIN:
        return _decision(layer, False, f"kept dense: {ratio:.2f}x {at}", ratio)
    return _decision(layer, True, f"block-sparse: {ratio:.2f}x {at}", ratio, tiles)


def _pairs(program: Program, layer: SparseLayer) -> str:
    """2:4: no artefact holds torch's sparse form; what keeps this weight from it, or how it gets there."""
    why = why_not(layer.matrix.matrix(program.tensors[layer.matrix.parameter].detach()))
    return (
        f"kept dense: 2:4 stays in a dense weight, for {why}"
        if why
        else "kept dense: 2:4 stays in a dense weight until fxprune.target.semi_structured.to_semi_structured(module)"
    )


def _decision(layer: SparseLayer, sparse: bool, said: str, ratio: float | None, tiles: int = 0) -> Decision:
    matrix = layer.matrix
    effective = round(matrix.macs * layer.density)
    executed = matrix.macs if not sparse else matrix.rows * tiles * layer.tile[0] * layer.tile[1]
    return Decision(layer, matrix.rows * matrix.batch, sparse, said, ratio, matrix.macs, effective, executed)


def cuda_name() -> str:
    """The name of this machine's GPU, or "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
