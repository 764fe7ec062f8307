"""Block sparsity in plain ATen: padded block-ELL, which exports with no custom op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ...ir.dataflow import bind, find_bias
from ...ir.layer_editor import Replacing
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...target.block_table import BlockTable
from ...target.gate import Decision, SparseLayer, decide

aten = torch.ops.aten


@dataclass(frozen=True)
class UseBlockEll(Transform):
    """Layers with zeros in whole tiles become a gather and one batched product where ``table`` says that it is faster.

    ``y[:, I] = sum_l x[:, tile idx[I, l]] W[I, l]^T``: every row of tiles is padded to as many tiles as the fullest
    has, so what runs is ``rows of tiles x longest row`` tiles.

    table    what was measured on the runtime that will run it, or None: then nothing is replaced
    device   where it will run, for the words when there is no table
    """

    table: BlockTable | None = field(default=None, repr=False)
    device: str = ""

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, tuple[Decision, ...]]:
        """(the program, a decision per sparse layer)."""
        decisions = tuple(decide(program, self.table, self.device, count_padded))
        chosen = [d.layer for d in decisions if d.sparse]
        return replace_layers(program, chosen, self.slug()) if chosen else program, decisions


def replace_layers(program: Program, layers: Sequence[SparseLayer], by: str) -> Program:
    """The program with these layers as block-ELL."""
    edit = Replacing(program, by)
    for layer in layers:
        _replace(edit, layer)
    return program.without_facts(exported=edit.finish())


def ell(weight: Tensor, live: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(blocks [rows, L BK, BN], index [rows L] int64) of a weight [out, in] whose tiles are ``live`` [rows, columns].

    L is the largest number of live tiles in a row; shorter rows are filled with zeros that read the first tile.
    """
    (rows, columns), (bn, bk) = live.shape, tile
    longest = max(1, int(live.sum(1).max()))
    padded = functional.pad(weight, (0, columns * bk - weight.shape[1], 0, rows * bn - weight.shape[0]))
    grid = padded.view(rows, bn, columns, bk)
    blocks, index = weight.new_zeros(rows, longest, bk, bn), torch.zeros(rows, longest, dtype=torch.int64)
    for row in range(rows):
        here = live[row].nonzero()[:, 0]
        index[row, : len(here)] = here
        blocks[row, : len(here)] = grid[row][:, here].permute(1, 2, 0)
    return blocks.view(rows, longest * bk, bn), index.flatten()


def _replace(edit: Replacing, layer: SparseLayer) -> None:
    matrix = layer.matrix
    node = edit.nodes[matrix.node]
    weight = matrix.matrix(edit.program.tensors[matrix.parameter].detach())
    blocks, index = (
        edit.tensor(matrix.weight, n, t)
        for n, t in zip(("blocks", "index"), ell(weight, layer.live, layer.tile), strict=True)
    )
    (rows, columns), (_, bk), (outputs, inputs) = layer.live.shape, layer.tile, matrix.shape
    bias = find_bias(node)
    with edit.graph.inserting_before(node):

        def emit(target: Any, *args: Any) -> Node:
            return edit.call(node, target, *args)

        source = bind(node)[matrix.operand]
        x = source
        if columns * bk != inputs:
            x = emit(aten.constant_pad_nd.default, x, [0, columns * bk - inputs])
        x = emit(aten.reshape.default, x, [-1, columns, bk])
        x = emit(aten.index_select.default, x, 1, index)
        length = blocks.meta["val"].shape[1]
        x = emit(aten.transpose.int, emit(aten.reshape.default, x, [-1, rows, length]), 0, 1)
        y = emit(aten.transpose.int, emit(aten.bmm.default, x, blocks), 0, 1)
        shape = [
            emit(aten.sym_size.int, source, i) if isinstance(s, torch.SymInt) else s
            for i, s in enumerate(source.meta["val"].shape[:-1])
        ]
        y = emit(aten.reshape.default, y, [*shape, rows * layer.tile[0]])
        if rows * layer.tile[0] != outputs:
            y = emit(aten.slice.Tensor, y, -1, 0, outputs)
        if bias is not None:
            y = emit(aten.add.Tensor, y, bias)
    edit.instead(node, y)


def count_padded(layer: SparseLayer) -> int:
    """How many tiles run when every row of tiles is as long as the fullest."""
    return len(layer.live) * max(1, int(layer.live.sum(1).max()))
