"""SparsifyBlocks: zeros where the plan says, everything else as it was, and block-sparse equals dense with zeros."""

from __future__ import annotations

import pytest
import torch
from support import tiled
from support.blocks import TransposedWeights
from support.recovering import floats

from fxprune.errors import PlanError
from fxprune.ir.linear_layers import live_tiles
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.sparsity import Sparsity
from fxprune.ops.block_sparse_linear import block_sparse_linear, pack
from fxprune.testing import run_flat


@pytest.mark.parametrize("pattern", ["8x4", "2:4"])
def test_zeros_stand_where_the_plan_says_and_nowhere_else(pattern: str) -> None:
    given = tiled.data(2)
    program = tiled.planned(tiled.analysed(tiled.model(), given, pattern), given, criterion="magnitude")
    result = tiled.zeroed(program)
    assert result.plan is None
    blocks = program.need("plan").blocks
    assert blocks
    for name, tensor in program.tensors.items():
        mask = blocks[name].mask() if name in blocks else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(result.tensors[name], tensor * mask), name
    for name, kept in blocks.items():
        assert torch.equal(live_tiles(result.tensors[name], kept.tile), kept.kept)


def test_weights_stored_the_other_way_round_are_zeroed_by_outputs_and_inputs() -> None:
    torch.manual_seed(0)
    given = floats(2, 5, 24)
    program = tiled.planned(tiled.analysed(TransposedWeights(), given, "8x4", ends=True), given, 0.6, "magnitude")
    result, blocks = tiled.zeroed(program), program.need("plan").blocks
    assert blocks
    for name, kept in blocks.items():
        assert kept.shape == tuple(reversed(program.tensors[name].shape))
        assert torch.equal(result.tensors[name].T != 0, kept.mask())


def test_the_op_on_the_kept_tiles_computes_what_the_zeroed_layer_computes() -> None:
    given = tiled.data(1)
    program = tiled.planned(tiled.analysed(tiled.model(), given), given)
    result = tiled.zeroed(program)
    for name, kept in program.need("plan").blocks.items():
        weight = tiled.weight(program, name)
        x = torch.randn(7, kept.shape[1])
        got = block_sparse_linear(x, *pack(weight, kept.kept, kept.tile), None, kept.shape[0], "none")
        torch.testing.assert_close(got, x @ result.tensors[name].T)


def test_an_empty_plan_changes_nothing() -> None:
    given = tiled.data(1)
    program = tiled.analysed(tiled.model(), given).but(plan=CompressionPlan())
    assert tiled.zeroed(program) is program


def test_a_plan_of_another_architecture_is_refused_by_name() -> None:
    given = tiled.data(1)
    program = tiled.analysed(tiled.model(), given)
    kept = torch.ones(3, 3, dtype=torch.bool)
    for name, message in (("up.weight", "another architecture"), ("missing.weight", "no linear layer")):
        plan = CompressionPlan().with_blocks({name: Sparsity("8x4", (20, 12), kept)})
        with pytest.raises(PlanError, match=message) as error:
            tiled.zeroed(program.but(plan=plan))
        assert name in error.value.where


def test_the_callers_weights_stay() -> None:
    given, model = tiled.data(1), tiled.model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    program = tiled.planned(tiled.analysed(model, given), given)
    out = run_flat(program, list(given.batches[0].args))
    tiled.zeroed(program)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(run_flat(program, list(given.batches[0].args))[0], out[0])
