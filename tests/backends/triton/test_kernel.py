"""The kernel without a GPU: numerics in Triton's interpreter, and compiled for real chips. It is not run on a GPU here.

bfloat16 is compiled only: the interpreter's bfloat16 products are wrong without a word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import drawing

from fxprune.backends.triton.configurations import CONFIGURATIONS, SHARED_LIMIT, default, usable
from fxprune.backends.triton.launch import launch
from fxprune.errors import LoweringError

pytest.importorskip("triton", reason="the test extra brings it on Linux")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from interpret import CASES  # noqa: E402

SPILL_BOUND = 0  # bytes of registers spilt per thread; every configuration was chosen to spill none


CHIPS = drawing.of((86,), tuple(SHARED_LIMIT))  # the one with the least shared memory, or all


def _script(name: str, *argv: str, **environment: str) -> Any:
    run = subprocess.run(
        [sys.executable, str(HERE / name), *argv], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = _script("interpret.py", TRITON_INTERPRET="1")
    return found


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _script("aot.py", *map(str, CHIPS))
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_interpreter_agrees_with_fp64_and_nothing_is_written_beside(
    case: str, interpreted: dict[str, dict[str, Any]]
) -> None:
    tolerance = 1e-6 if CASES[case][5] is torch.float32 else 1e-3
    assert interpreted[case]["error"] < tolerance
    assert interpreted[case]["guard"], "the kernel wrote outside of y"


def test_every_configuration_compiles_for_every_chip(compiled: list[dict[str, Any]]) -> None:
    made = {(r["arch"], tuple(r["tile"]), r["configuration"]) for r in compiled if r["dtype"] == "fp16"}
    assert made == {
        (arch, tile, str(one)) for arch in CHIPS for tile, several in CONFIGURATIONS.items() for one in several
    }


def test_shared_memory_spills_and_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    for r in compiled:
        assert r["shared"] <= SHARED_LIMIT[r["arch"]], r
        assert r["spills"] <= SPILL_BOUND, r
        if r["dtype"] == "fp32" and r["precision"] == "ieee":
            assert not r["mma"], "IEEE fp32 has no tensor cores to run on"
        else:
            assert r["mma"].startswith("wgmma" if r["arch"] == 90 else "mma.sync"), r


def test_the_pipeline_holds_more_than_one_product(compiled: list[dict[str, Any]]) -> None:
    """With too few stages the index takes them all, and nothing is loaded ahead."""
    for r in compiled:
        if r["dtype"] == "fp16":
            rows = int(r["configuration"].partition(",")[0].removeprefix("rows="))
            one = (rows + r["tile"][0]) * r["tile"][1] * 2
            assert r["shared"] >= 1.5 * one, r


def test_tiles_without_a_configuration_are_refused_by_name() -> None:
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(LoweringError, match="8x8"):
        launch(torch.zeros(1, 8), torch.zeros(0, 8, 8), index, index[:0], None, 8, "none")


def test_without_triton_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fxprune.backends.triton.kernels.block_sparse", None)
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(LoweringError, match=r"fxprune\[triton\]"):
        launch(torch.zeros(1, 16), torch.zeros(0, 16, 16), index, index[:0], None, 16, "none")


def test_few_rows_take_few_rows_per_program_and_wide_types_what_fits() -> None:
    for tile, several in CONFIGURATIONS.items():
        assert default(197, tile, 2).rows < default(197 * 64, tile, 2).rows
        assert usable(tile, 2) == several
        assert default(197 * 64, tile, 4) in usable(tile, 4)
    assert len(usable((64, 64), 4)) < len(CONFIGURATIONS[64, 64])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", CONFIGURATIONS)
def test_on_a_gpu_the_kernel_agrees_with_fp64(tile: tuple[int, int], dtype: torch.dtype) -> None:
    from fxprune.ops.block_sparse_linear import block_sparse_linear, pack, reference

    n, k, m = 200, 150, 333
    kept = torch.rand(-(-n // tile[0]), -(-k // tile[1])) < 0.5
    x, bias, weight = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(n, k).to(dtype)
    tiles, offsets, columns = pack(weight, kept, tile)
    want = reference(x.double(), tiles.double(), offsets, columns, bias.double(), n, "gelu")
    moved = [t.cuda() for t in (x, tiles, offsets, columns, bias)]
    got = block_sparse_linear(*moved, n, "gelu").cpu().double()
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert float((got - want).abs().max() / want.abs().max()) < tolerance
