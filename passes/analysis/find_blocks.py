"""``FindBlocks``: cut the weight of every linear layer into tiles, and say why some layers stay dense."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

from ...errors import OptionError
from ...ir.axes import Axes
from ...ir.axis import Axis
from ...ir.group import Kind, Slot
from ...ir.linear_layers import BlockGroup, Matrix, matrices
from ...ir.pipeline import Analysis
from ...ir.program import Program
from ...ir.signature import batch_axes
from ...ir.sparsity import grid, tile_of
from .importance.consumers import find_sample_dim


@dataclass(frozen=True)
class FindBlocks(Analysis):
    """One BLOCK group per linear layer: queries, keys, values, projections, feed-forward, whatever is a product with a
    weight of its own. Its elements are the tiles, row by row, those at ragged borders included.

    pattern   ``32x32``: tiles of so many outputs by so many inputs; ``2:4``: single weights
    ends      also the layers at the ends: patch embeddings and classifiers, which stay dense by default (few weights,
              and much hangs on each)
    floor     smallest share of a layer's tiles that stays. Curves are those of one layer alone: without a floor the
              second layer of a feed-forward part may go entirely while the first one, now useless, is kept (MiniLM at
              0.5 of the MACs, 32x32, recovered: 80.7 without, 84.2 with 0.1, 84.9 with 0.25)
    freeze    glob patterns of parameter names to leave dense

    Replaces the groups of the program: tiles are of what slicing left, so slicing comes first.
    """

    needs: ClassVar[tuple[str, ...]] = ("axes",)
    gives: ClassVar[tuple[str, ...]] = ("groups",)

    pattern: str = "32x32"
    ends: bool = False
    floor: float = 0.1
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        tile_of(self.pattern)
        if not 0 <= self.floor < 1:
            raise OptionError("the floor of blocks is a share below 1", where=f"floor={self.floor}")

    def run(self, program: Program) -> Program:
        found = matrices(program)
        for pattern in self.freeze:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in program.tensors):
                raise OptionError(
                    f"'{pattern}' matches no parameter",
                    where="--freeze",
                    cure="`fxprune inspect MODEL` lists the names; write a glob such as 'blocks.0.*'",
                )
        return program.but(groups=tuple(self._group(program, m) for m in found), scores=None, plan=None)

    def _group(self, program: Program, matrix: Matrix) -> BlockGroup:
        axes: Axes = program.need("axes")
        tile = tile_of(self.pattern)
        rows, columns = grid(matrix.shape, tile)
        size, dims = rows * columns, axes.dims[matrix.weight]
        return BlockGroup(
            name=f"{matrix.parameter}:block",
            kind=Kind.BLOCK,
            size=size,
            axis=Axis(size, "tile"),
            exact=True,
            slots=tuple(Slot(matrix.parameter, i, dim) for i, dim in enumerate(dims)),
            nodes=(matrix.node,),
            macs=matrix.rows * tile[0] * tile[1],
            floor=min(size, round(size * self.floor)),
            frozen=self._why(program, matrix),
            matrix=matrix,
            pattern=self.pattern,
            tile=tile,
        )

    def _why(self, program: Program, matrix: Matrix) -> str:
        hit = next((p for p in self.freeze if fnmatch.fnmatchcase(matrix.parameter, p)), "")
        if hit:
            return f"asked to freeze '{hit}'"
        if matrix.dense and not (self.ends and matrix.dense.startswith(("a classifier", "a patch embedding"))):
            return matrix.dense
        if find_sample_dim(program.need("axes").dims[matrix.source], batch_axes(program)) is None:
            return "its input does not depend on the samples"
        return ""
