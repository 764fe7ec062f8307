"""RecoverBlocks: the closed form by hand, errors that fall, zeros that stay, and a guard that can say no."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import recovering, tiled
from support.blocks import Encoder

from fxprune.cli.demo import Digits, DigitsViT
from fxprune.errors import OptionError
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.sparsity import Sparsity
from fxprune.passes.transform.recover_blocks import RecoverBlocks
from fxprune.passes.transform.recovery.moments import Moments
from fxprune.passes.transform.recovery.tile_form import by_rows
from fxprune.testing import run_flat


def recovered(program: Program, given: Any, method: str = "ridge", **options: Any) -> tuple[Program, Any]:
    one = RecoverBlocks(method, data=given, **options)
    after, (result,) = Pipeline((one,), start=tiled.START).apply(program)
    return after, result.record


@pytest.mark.parametrize("pattern", ["4x3", "2:4"])
def test_every_row_of_tiles_is_the_ridge_solution_over_what_it_reads(pattern: str) -> None:
    torch.manual_seed(0)
    shape, rel = (10, 8), 0.2
    tile = Sparsity("4x3", shape, torch.ones(3, 3, dtype=torch.bool)).tile if pattern == "4x3" else (1, 1)
    grid = (3, 3) if pattern == "4x3" else shape
    kept = torch.rand(grid) < 0.6
    kept[1] = False
    sparsity = Sparsity(pattern, shape, kept)
    c, weight = torch.randn(60, 8).double(), torch.randn(shape).double()
    r = c @ (weight * ~sparsity.mask()).T  # what the masked layer misses
    moments = Moments()
    moments.add(c, r, torch.ones(60).double())
    change = by_rows(moments.finish(centred=False), sparsity, 100 * weight, rel)  # large weights: no limit in reach
    g, b = c.T @ c / 60, c.T @ r / 60
    for row in range(shape[0]):
        reads = kept[row // tile[0]].repeat_interleave(tile[1])[:8]
        want = torch.zeros(8).double()
        if reads.any():
            damped = g[reads][:, reads] + rel * float(g.diagonal().mean()) * torch.eye(int(reads.sum())).double()
            want[reads] = torch.linalg.solve(damped, b[reads, row])
        torch.testing.assert_close(change[row], want, rtol=1e-8, atol=1e-10)


def test_a_change_beyond_the_weights_own_size_makes_the_ridge_stronger() -> None:
    torch.manual_seed(0)
    c = torch.randn(60, 8).double()
    moments = Moments()
    moments.add(c, 50 * torch.randn(60, 4).double() + c[:, :4] * 80, torch.ones(60).double())
    small = torch.full((4, 8), 0.1).double()
    sparsity = Sparsity("4x4", (4, 8), torch.tensor([[True, False]]))
    change = by_rows(moments.finish(centred=False), sparsity, small, 0.01)
    free = by_rows(moments.finish(centred=False), sparsity, 1e4 * small, 0.01)
    assert float(change.norm()) < float(free.norm()) / 2
    assert torch.equal(change[:, 4:], torch.zeros(4, 4).double())


@pytest.mark.drawn(2)
@pytest.mark.parametrize("method", ["ridge", "obs"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_error_falls_at_every_layer_and_zeros_stay_zero(method: str, norm: str) -> None:
    torch.manual_seed(0)
    given = recovering.texts(64)
    program = tiled.planned(tiled.analysed(Encoder(norm), given, "8x4"), given, 0.5)
    after, record = recovered(program, given, method)
    assert {s.parameter for s in record.steps} == set(program.need("plan").blocks)
    assert all(s.after <= s.before * (1 + 1e-9) for s in record.steps)
    assert any(s.after < 0.95 * s.before for s in record.steps)
    for name, kept in program.need("plan").blocks.items():
        gone = ~kept.mask()
        assert torch.equal(after.tensors[name][gone], program.tensors[name][gone]), "what will be zeroed stays"
        assert torch.equal(tiled.zeroed(after).tensors[name] != 0, kept.mask())
    inputs = recovering.flat(program, given.batches[0])
    dense, plain, better = (run_flat(p, inputs)[0] for p in (program, tiled.zeroed(program), tiled.zeroed(after)))
    assert float((better - dense).norm()) < float((plain - dense).norm())


def test_the_guard_keeps_what_agrees_best_and_never_less_than_nothing(trained: DigitsViT, digit_data: Digits) -> None:
    images = digit_data.train_images[:256]
    given = recovering.Calibration(tuple(recovering.Batch((x,)) for x in images.split(64)), "digits")
    program = tiled.planned(tiled.analysed(trained, given, "8x8"), given, 0.35)
    after, record = recovered(program, given, "auto")
    assert set(record.guard) == {"none", "ridge", "obs"}
    assert record.guard[record.chosen]["mixed"] >= record.guard["none"]["mixed"]
    assert record.held_out == 64
    assert record.samples == 256

    def accuracy(p: Program) -> float:
        return float(
            (run_flat(tiled.zeroed(p), [digit_data.test_images])[0].argmax(1) == digit_data.test_labels).float().mean()
        )

    assert accuracy(after) > accuracy(program)
    assert any(note.startswith("tiles: recovery") for note in after.notes)


def test_too_few_samples_to_judge_recover_nothing() -> None:
    given = tiled.data(1, 2)
    program = tiled.planned(tiled.analysed(tiled.model(), given), given)
    after, record = recovered(program, given, "auto")
    assert record.chosen == "none"
    assert "too few samples" in record.skipped[""]
    assert all(torch.equal(t, program.tensors[n]) for n, t in after.tensors.items())


def test_two_of_four_with_obs_and_its_update_loses_less_than_magnitude() -> None:
    """At the first sparse layer, whose inputs are the same in all of them: mean squared error of its output."""
    given, model = tiled.data(8, 16), tiled.model()
    left = {}
    for criterion in ("magnitude", "obert"):
        program = tiled.planned(tiled.analysed(model, given, "2:4"), given, criterion=criterion)
        _, record = recovered(program, given, "obs")
        assert record.steps[0].parameter == "qkv.weight"
        left[criterion] = record.steps[0]
    assert left["obert"].after < left["magnitude"].after < left["magnitude"].before


def test_mistakes_are_refused() -> None:
    given = tiled.data(1)
    program = tiled.planned(tiled.analysed(tiled.model(), given), given)
    with pytest.raises(OptionError, match="needs data"):
        recovered(program, None)
    with pytest.raises(OptionError, match="unknown recovery of tiles 'rigde'"):
        RecoverBlocks("rigde")
    with pytest.raises(OptionError, match="between 0 and 1"):
        RecoverBlocks(held_out=1.0)
    assert recovered(program, None, "none")[0] is program
