"""The table, the gate, and the words that say why a layer stays dense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiled
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.capture import capture
from fxprune.ir.program import Program
from fxprune.ir.sparsity import is_two_of_four, spread, two_of_four
from fxprune.target.block_table import BlockTable, Timing, find_table_path, make_table, table_for
from fxprune.target.gate import decide, keep_dense, report, sparse_weights, words


class Two(nn.Module):
    """Two layers of 64 x 64 with zeros in tiles of 32 x 32 (half, a quarter kept), a dense one, and one in 2:4."""

    def __init__(self) -> None:
        super().__init__()
        self.fifty, self.quarter, self.whole, self.pairs = (nn.Linear(64, 64) for _ in range(4))
        with torch.no_grad():
            self.fifty.weight *= spread(torch.eye(2), (64, 64), (32, 32))
            self.quarter.weight *= spread(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), (64, 64), (32, 32))
            self.pairs.weight *= two_of_four(self.pairs.weight.abs())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for one in (self.fifty, self.quarter, self.whole, self.pairs):
            x = torch.nn.functional.gelu(one(x))
        return x


@pytest.fixture
def program() -> Program:
    return capture(Two().eval(), (torch.randn(2, 5, 64),))


def timing(density: float = 0.5, ratio: float = 2.0, m: int = 10, **changes: object) -> Timing:
    given = {
        "n": 64,
        "k": 64,
        "pattern": "32x32",
        "dtype": "float32",
        "m": m,
        "density": density,
        "dense_ms": ratio,
        "sparse_ms": 1.0,
        "configuration": "rows=64,warps=4,stages=8",
    }
    return Timing(**{**given, **changes})  # type: ignore[arg-type]


def test_layers_are_found_by_their_zeros(program: Program) -> None:
    found = {s.matrix.parameter: s for s in sparse_weights(program)}
    assert {n: (s.pattern, s.density) for n, s in found.items()} == {
        "fifty.weight": ("32x32", 0.5),
        "quarter.weight": ("32x32", 0.25),
        "pairs.weight": ("2:4", 0.5),
    }
    assert not is_two_of_four(torch.ones(2, 8))
    assert not is_two_of_four(torch.zeros(2, 3)), "nothing is asked of less than four"


def test_without_a_table_layers_stay_dense_and_say_so(program: Program) -> None:
    decisions = decide(program, None, "NVIDIA X")
    assert [d.sparse for d in decisions] == [False] * 3
    assert decisions[0].said == "kept dense: no table was measured for NVIDIA X"
    assert all(d.executed == d.dense == 5 * 64 * 64 for d in decisions)
    assert [d.effective for d in decisions] == [5 * 64 * 32, 5 * 64 * 16, 5 * 64 * 32]
    assert "(2 layers, such as fifty.weight)" in words(decisions)[0]
    assert report(decisions)["macs"] == {"dense": 3 * 20480, "effective": 2 * 10240 + 5120, "executed": 3 * 20480}
    assert report(decisions)["table"] is None
    assert report([]) == {}


def test_a_layer_runs_sparse_only_where_the_table_says_that_it_wins(program: Program) -> None:
    table = make_table("NVIDIA X", "kernel", [timing(0.25, 2.5), timing(0.5, 0.9)])
    half, quarter, pairs = decide(program, table, "NVIDIA X")
    assert not half.sparse
    assert half.said.startswith("kept dense: 0.90x at M=10 (table of NVIDIA X, 20")
    assert quarter.sparse
    assert quarter.said.startswith("block-sparse: 2.50x at M=10")
    assert quarter.executed == quarter.effective == 5 * 64 * 16
    assert not pairs.sparse
    assert "2:4" in pairs.said
    written = report([half, quarter, pairs], table)
    assert written["table"]["device"] == "NVIDIA X"
    assert written["layers"][1]["ratio"] == 2.5
    assert written["macs"]["executed"] == 2 * 20480 + 5120


def test_a_tie_is_not_worth_another_kernel(program: Program) -> None:
    assert not any(d.sparse for d in decide(program, make_table("X", "kernel", [timing(0.5, 1.02)]), "X"))


def test_what_was_not_measured_is_not_believed(program: Program) -> None:
    for other in ({"n": 128}, {"pattern": "64x64"}, {"dtype": "float16"}, {"m": 100}, {"density": 0.1}):
        half = decide(program, make_table("X", "kernel", [timing(**{"ratio": 3.0, **other})]), "X")[0]  # type: ignore[arg-type]
        assert not half.sparse
        assert "is not in the table of X" in half.said


def test_the_nearest_rows_and_the_next_density_are_taken() -> None:
    table = make_table(
        "X", "kernel", [timing(0.25, 4, 10), timing(0.5, 3, 10), timing(0.75, 2, 10), timing(0.5, 9, 18)]
    )
    found = table.find(64, 64, "32x32", "float32", 12, 0.3)
    assert found is not None
    assert found.ratio == 3
    assert table.find(64, 64, "32x32", "float32", 17, 0.3).ratio == 9  # type: ignore[union-attr]
    assert table.find(64, 64, "32x32", "float32", 12, 0.8) is None


def test_targets_without_sparse_kernels_keep_everything_dense(program: Program) -> None:
    said = [d.said for d in keep_dense(program, "so it is")]
    assert said[:2] == ["kept dense: so it is"] * 2
    assert said[2].startswith("kept dense: 2:4 stays in a dense weight, for the kernels take float16, bfloat16, int8, ")
    assert not keep_dense(capture(tiled.model().eval(), (torch.randn(2, 5, 10),)), "nothing to say")


def test_a_table_is_kept_under_its_devices_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_for("NVIDIA X 80GB", "kernel") is None
    assert table_for("", "kernel") is None
    table = make_table("NVIDIA X 80GB", "kernel", [timing()])
    table.write(find_table_path(table.device, table.form))
    assert [p.name for p in tmp_path.rglob("*.json")] == ["kernel-NVIDIA-X-80GB.json"]
    assert table_for("NVIDIA X 80GB", "kernel") == table
    assert table_for("other", "kernel", str(find_table_path(table.device, "kernel"))) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no table"),
        ("[]", "no table"),
        ('{"fxprune_blocks": 9}', "no table"),
        ('{"fxprune_blocks": 1, "rows": [{"n": 1}]}', "no table"),
    ],
)
def test_files_that_are_no_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(LoadError, match=message):
        BlockTable.read(path)
    with pytest.raises(LoadError, match="cannot be read"):
        BlockTable.read(tmp_path / "missing.json")
