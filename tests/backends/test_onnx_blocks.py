"""Block sparsity in ONNX: block-ELL in plain ops where a table says that it wins, else zeros in a dense weight."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.backends.onnx import tune as onnx_tune
from fxprune.backends.onnx.block_ell import UseBlockEll, ell
from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.sparsity import spread
from fxprune.registry import backend
from fxprune.target.backend import lower_and_verify
from fxprune.target.block_table import BlockTable, Timing, make_table
from fxprune.testing import run_flat


class Layers(nn.Module):
    """Two ragged layers on [batch, sequence, 40] with zeros in tiles of 16 x 32; rows of tiles differ in length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(40, 70), nn.Linear(70, 40, bias=False)
        with torch.no_grad():
            kept = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1], [1, 1]])
            self.a.weight *= spread(kept.float(), (70, 40), (16, 32))
            self.b.weight *= spread(torch.eye(3), (40, 70), (16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def program() -> Program:
    torch.manual_seed(0)
    return capture(Layers().eval(), (torch.randn(3, 6, 40),))


def winning(form: str = "ell") -> BlockTable:
    rows = [Timing(n, k, "16x32", "float32", 18, 1.0, 2.0, 1.0) for n, k in ((70, 40), (40, 70))]
    return make_table("some CPU", form, rows)


def test_block_ell_holds_the_weight() -> None:
    weight = torch.randn(70, 40)
    live = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1], [1, 1]]).bool()
    blocks, index = ell(weight, live, (16, 32))
    assert blocks.shape == (5, 2 * 32, 16)
    assert index.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1]
    torch.testing.assert_close(blocks[2, :32].T, weight[32:48, :32])
    assert blocks[0].abs().sum() == 0


def test_winning_layers_are_a_gather_and_one_product_at_any_size() -> None:
    dense, gate = program(), UseBlockEll(winning(), "some CPU")
    made_of, (gated,) = Pipeline((gate,)).apply(dense)
    assert sum("bmm" in str(n.target) for n in made_of.graph.nodes) == 2
    assert not any("linear" in str(n.target) for n in made_of.graph.nodes)
    for batch in (1, 4):
        x = torch.randn(batch, 6, 40)
        torch.testing.assert_close(run_flat(made_of, [x])[0], run_flat(dense, [x])[0], rtol=1e-5, atol=1e-5)
    padded = 6 * (5 * 2 + 3 * 1) * 16 * 32
    assert sum(d.executed for d in gated.record) == padded
    with FlopCounterMode(display=False) as counter:
        run_flat(made_of, [torch.randn(1, 6, 40)])
    assert counter.get_total_flops() == 2 * padded, "what the report says runs is what the graph multiplies"


def test_layers_are_looked_up_by_what_padding_makes_of_them() -> None:
    """``a`` keeps 6 of 10 tiles and multiplies all 10: a timing at 0.7 says nothing about it."""
    narrow = make_table("some CPU", "ell", [Timing(70, 40, "16x32", "float32", 18, 0.7, 9.0, 1.0)])
    gate = UseBlockEll(narrow, "some CPU")
    _, (gated,) = Pipeline((gate,)).apply(program())
    assert not any(d.sparse for d in gated.record)


def test_with_a_recorded_table_the_file_holds_block_ell(tmp_path: Path) -> None:
    winning().write(tmp_path / "table.json")
    folder = tmp_path / "out"
    folder.mkdir()
    lowered, parity = lower_and_verify(backend("onnx", table=str(tmp_path / "table.json")), program(), folder)
    assert parity.ok
    ops = [n.op_type for n in onnx.load(str(lowered.payload)).graph.node]
    assert ops.count("Gather") == 2
    assert all("block-sparse: 2.00x at M=18 (table of some CPU" in n for n in lowered.notes)
    assert {n.domain for n in onnx.load(str(lowered.payload)).graph.node} == {""}, "no custom op"


def test_without_a_table_zeros_stay_in_a_dense_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    folder.mkdir()
    lowered, parity = lower_and_verify(backend("onnx"), program(), folder)
    assert parity.ok
    assert "Gather" not in [n.op_type for n in onnx.load(str(lowered.payload)).graph.node]
    assert lowered.notes[0].startswith("kept dense: no table was measured for onnxruntime on ")
    assert lowered.sparsity["macs"]["executed"] == lowered.sparsity["macs"]["dense"]


def test_tuning_measures_both_forms_on_this_cpu() -> None:
    told: list[tuple[str, int, int]] = []
    table = onnx_tune.measure(
        [(64, 64)], [10, 20], ["32x32"], [0.5], "float32", lambda *a: told.append(a), threads=1, seconds=0.01
    )
    assert [t.m for t in table.rows] == [10, 20]
    assert {t.density for t in table.rows} <= {0.5, 1.0}, "two tiles of four: one in each row, or padded to all"
    assert all(t.dense_ms > 0 and t.sparse_ms > 0 for t in table.rows)
    assert table.form == "ell"
    assert [(done, total) for _, done, total in told] == [(0, 2), (1, 2)]
    with pytest.raises(OptionError, match="float32"):
        onnx_tune.measure([(64, 64)], [10], ["32x32"], [0.5], "float16", lambda *a: None)
    with pytest.raises(OptionError, match="leaves no tile"):
        onnx_tune.measure([(64, 64)], [10], ["64x64"], [0.9], "float32", lambda *a: None)
