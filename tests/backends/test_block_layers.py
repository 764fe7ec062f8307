"""Block-sparse equals dense with zeroed tiles, in real models, whichever form the layers take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import laws

from fxprune.backends.onnx.block_ell import UseBlockEll
from fxprune.backends.triton.legalize import UseKernels
from fxprune.ir.linear_layers import matrices
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.sparsity import grid, spread
from fxprune.passes.transform.sparsify_blocks import mask_tiles
from fxprune.target.block_table import BlockTable, Timing
from fxprune.target.gate import sparse_weights
from fxprune.testing import relative_error, run_flat

MODELS = ("vit", "bert", "swin", "transposed_weights", "gated_ffn", "gqa_repeat")


def zeroed(name: str) -> Program:
    """A zoo model with random tiles of 16 x 16 zeroed in every layer that has a weight of its own."""
    program = laws.analysed(name)
    generator, masks = torch.Generator().manual_seed(0), {}
    for m in matrices(program):
        if m.dense == "its weight is shared":
            continue
        kept = torch.rand(grid(m.shape, (16, 16)), generator=generator) < 0.6
        kept[0, 0] = False
        masks[m.parameter] = m.store(spread(kept, m.shape, (16, 16)))
    return program.without_facts(exported=mask_tiles(program, masks))


def always(program: Program, form: str) -> BlockTable:
    """A table that lets every sparse layer of the program through."""
    return BlockTable(
        "any",
        form,
        tuple(
            Timing(*s.matrix.shape, s.pattern, "float32", s.matrix.rows * s.matrix.batch, 1.0, 2.0, 1.0)
            for s in sparse_weights(program)
        ),
    )


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("use", "op"), [(UseKernels, "block_sparse_linear"), (UseBlockEll, "bmm")])
def test_block_sparse_equals_dense_with_zeroed_tiles(name: str, use: Any, op: str) -> None:
    program = zeroed(name)
    gate = use(always(program, "any"), "any")
    result, (gated,) = Pipeline((gate,)).apply(program)
    assert gated.record
    assert all(d.sparse for d in gated.record)
    assert sum(op in str(n.target) for n in result.graph.nodes) >= len(gated.record)
    for batch in (2, 3):
        flat = laws.inputs(program, batch)
        assert relative_error(run_flat(result, flat), run_flat(program, flat)) < laws.TOLERANCE
    laws.saving_keeps_the_output(result)
