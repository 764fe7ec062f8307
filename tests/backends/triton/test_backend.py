"""The triton target on a machine without a GPU: the gate, the replaced layers by their CPU reference, and the words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiled
from torch import Tensor, nn
from torch.nn import functional

from fxprune.backends.triton.configurations import CONFIGURATIONS, Configuration
from fxprune.backends.triton.launch import fastest
from fxprune.backends.triton.legalize import UseKernels
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.sparsity import spread
from fxprune.registry import backend
from fxprune.target.backend import lower_and_verify
from fxprune.target.block_table import BlockTable, Timing, find_table_path, make_table
from fxprune.testing import run_flat


class Layers(nn.Module):
    """Linear with GELU, linear with SiLU, addmm, and one whose activation is not alone in reading it; ragged tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(40, 70), nn.Linear(70, 40, bias=False), nn.Linear(40, 40)
        self.w, self.v = nn.Parameter(torch.randn(40, 40) / 6), nn.Parameter(torch.zeros(40))
        with torch.no_grad():
            for p in (self.a.weight, self.b.weight, self.c.weight, self.w):
                kept = (torch.rand(-(-p.shape[0] // 16), -(-p.shape[1] // 16)) < 0.6).float()
                kept[0, 0], kept[-1, -1] = 0, 1
                p *= spread(kept, (p.shape[0], p.shape[1]), (16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.b(functional.gelu(self.a(x))))
        y = self.c(x)
        z = functional.gelu(y) + y
        b, t, d = z.shape
        return torch.addmm(self.v, z.reshape(b * t, d), self.w).view(b, t, d)


def program(dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return capture(Layers().eval().to(dtype), (torch.randn(3, 4, 40, dtype=dtype),))


def winning(dtype: str = "float32", **changes: Any) -> BlockTable:
    shapes = ((70, 40), (40, 70), (40, 40))
    return make_table(
        "NVIDIA X",
        "kernel",
        [
            Timing(
                **{  # type: ignore[arg-type]
                    "n": n,
                    "k": k,
                    "pattern": "16x16",
                    "dtype": dtype,
                    "m": 12,
                    "density": 1.0,
                    "dense_ms": 2.0,
                    "sparse_ms": 1.0,
                    "configuration": "rows=128,warps=4,stages=8",
                    **changes,
                }
            )
            for n, k in shapes
        ],
    )


def called(p: Program) -> list[torch.fx.Node]:
    return [n for n in p.graph.nodes if "block_sparse_linear" in str(n.target)]


def test_winning_layers_call_the_op_and_compute_the_same() -> None:
    dense, gate = program(), UseKernels(winning(), "NVIDIA X")
    sparse_program, (gated,) = Pipeline((gate,)).apply(dense)
    nodes = called(sparse_program)
    assert [n.args[-1] for n in nodes] == ["gelu", "silu", "none", "none"]
    assert [n.meta["fxprune_pass"] for n in nodes] == ["use-kernels"] * 4
    assert [d.sparse for d in gated.record] == [True] * 4
    assert not any(n in sparse_program.tensors for n in ("a.weight", "w"))
    assert sparse_program.tensors["a.weight_tiles"].shape[1:] == (16, 16)
    assert not sparse_program.tensors["a.weight_tiles"].requires_grad
    for batch in (1, 5):
        x = torch.randn(batch, 4, 40)
        torch.testing.assert_close(run_flat(sparse_program, [x])[0], run_flat(dense, [x])[0], rtol=1e-5, atol=1e-5)
    assert "a.weight" in dense.tensors
    assert not called(dense)


def test_without_a_table_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "out"
    folder.mkdir()
    lowered, parity = lower_and_verify(backend("triton"), program(), folder)
    assert parity.ok
    assert lowered.payload.name == "model.triton.pt2"
    assert lowered.sparsity["macs"]["executed"] == lowered.sparsity["macs"]["dense"]
    assert lowered.sparsity["macs"]["effective"] < lowered.sparsity["macs"]["dense"]
    assert "kept dense: no table was measured for CUDA (this machine has no GPU)" in lowered.notes[0]


def test_a_recorded_table_is_named_and_its_winners_are_in_the_payload(tmp_path: Path) -> None:
    table = tmp_path / "x.json"
    winning().write(table)
    folder = tmp_path / "out"
    folder.mkdir()
    lowered, parity = lower_and_verify(backend("triton", table=str(table)), program(), folder)
    assert parity.ok
    assert len(parity.tried) >= 3
    assert lowered.sparsity["table"]["device"] == "NVIDIA X"
    assert lowered.sparsity["macs"]["executed"] < lowered.sparsity["macs"]["dense"]
    assert all("block-sparse: 2.00x at M=12" in note for note in lowered.notes)
    x = torch.randn(2, 4, 40)
    want = run_flat(program(), [x])[0]
    torch.testing.assert_close(backend("triton").load(lowered.payload)([x])[0], want, rtol=1e-5, atol=1e-5)


def test_half_precision_layers_are_looked_up_by_their_dtype() -> None:
    gate = UseKernels(winning("bfloat16"), "NVIDIA X")
    assert called(Pipeline((gate,)).run(program(torch.bfloat16)))
    gate = UseKernels(winning("bfloat16"), "NVIDIA X")
    assert not called(Pipeline((gate,)).run(program(torch.float16)))


def test_an_approximate_gelu_is_left_outside() -> None:
    class Approximate(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return functional.gelu(self.a(x), approximate="tanh")

    torch.manual_seed(0)
    dense = capture(Approximate().eval(), (torch.randn(3, 4, 40),))
    made_of = Pipeline((UseKernels(winning(), ""),)).run(dense)
    assert [n.args[-1] for n in called(made_of)] == ["none"]
    x = torch.randn(2, 4, 40)
    torch.testing.assert_close(run_flat(made_of, [x])[0], run_flat(dense, [x])[0], rtol=1e-5, atol=1e-5)


def test_the_kernel_runs_as_it_was_measured_to_be_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    winning().write(find_table_path("NVIDIA X", "kernel"))
    fastest.cache_clear()
    assert fastest("NVIDIA X", 70, 40, "16x16", "float32", 12, 0.5) == Configuration(128, 4, 8)
    assert fastest("NVIDIA X", 70, 41, "16x16", "float32", 12, 0.5) is None
    assert fastest("", 70, 40, "16x16", "float32", 12, 0.5) is None
    for several in CONFIGURATIONS.values():
        assert all(Configuration.parse(str(one)) == one for one in several)


def test_a_plan_of_tiles_of_another_size_is_found_in_the_zeros() -> None:
    given = tiled.data(1)
    zeroed = tiled.zeroed(tiled.planned(tiled.analysed(tiled.Classifier(48, 64), given, "16x16"), given, 0.6))
    gate = UseKernels(None, "X")
    _, (gated,) = Pipeline((gate,)).apply(zeroed)
    assert gated.record
    assert all(d.layer.pattern != "2:4" for d in gated.record)
