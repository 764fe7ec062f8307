"""The op: packing, its law, opcheck, export, save and load, torch.compile, and what it refuses."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.ir.cost import CostModel
from fxprune.ir.program import Program
from fxprune.ops.block_sparse_linear import block_sparse_linear, pack, unpack
from fxprune.passes.analysis.propagate_axes import PropagateAxes

SHAPES = [  # N, K, tile
    (8, 12, (4, 4)),
    (10, 13, (4, 8)),
    (3, 5, (16, 16)),
    (64, 32, (32, 16)),
]


def case(
    n: int, k: int, tile: tuple[int, int], dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """x, the masked dense weight, the kept grid, and the op's arguments; the first row of tiles is empty."""
    rows, columns = -(-n // tile[0]), -(-k // tile[1])
    kept = torch.rand(rows, columns) < 0.5
    kept[0] = rows == 1
    weight = torch.randn(n, k)
    dense = weight * kept.repeat_interleave(tile[0], 0)[:n].repeat_interleave(tile[1], 1)[:, :k]
    packed = pack(weight.to(dtype), kept, tile)
    x = torch.randn(2, 3, k).to(dtype)
    return x, dense.to(dtype), kept, (*packed, torch.randn(n).to(dtype) if bias else None, n)


@pytest.mark.parametrize(("n", "k", "tile"), SHAPES)
def test_packing_and_unpacking_gives_the_masked_weight(n: int, k: int, tile: tuple[int, int]) -> None:
    _, dense, kept, (tiles, offsets, columns, _, _) = case(n, k, tile)
    assert tiles.shape == (int(kept.sum()), *tile)
    assert offsets.dtype == columns.dtype == torch.int32
    assert offsets.tolist()[0] == 0
    assert offsets.diff().tolist() == kept.sum(1).tolist()
    assert torch.equal(unpack(tiles, offsets, columns, (n, k)), dense)


@pytest.mark.parametrize(("n", "k", "tile"), SHAPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_sparse_equals_dense_with_masked_tiles(
    n: int, k: int, tile: tuple[int, int], activation: str, dtype: torch.dtype
) -> None:
    x, dense, _, arguments = case(n, k, tile, dtype)
    y = functional.linear(x, dense, arguments[3])
    want = {"none": y, "gelu": functional.gelu(y), "silu": functional.silu(y)}[activation]
    assert torch.equal(block_sparse_linear(x, *arguments, activation), want)


def test_no_tile_at_all_leaves_the_bias() -> None:
    tiles, offsets, columns = pack(torch.randn(8, 8), torch.zeros(2, 2, dtype=torch.bool), (4, 4))
    bias = torch.randn(8)
    y = block_sparse_linear(torch.randn(3, 8), tiles, offsets, columns, bias, 8, "none")
    assert torch.equal(y, bias.expand(3, 8))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    x, _, _, arguments = case(10, 13, (4, 8), bias=bias)
    torch.library.opcheck(block_sparse_linear, (x, *arguments, "gelu"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, self.dense, _, (tiles, offsets, columns, bias, self.out) = case(10, 13, (4, 8))
        for name, tensor in (("tiles", tiles), ("offsets", offsets), ("columns", columns), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        b = [self.get_buffer(n) for n in ("tiles", "offsets", "columns", "bias")]
        return torch.ops.fxprune.block_sparse_linear(torch.relu(x), *b, self.out, "silu")


def test_export_save_load_and_compile_with_an_open_batch() -> None:
    layer = Layer()
    exported = torch.export.export(layer, (torch.randn(4, 3, 13),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert any("block_sparse_linear" in str(n.target) for n in exported.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch in (1, 4, 7):
        x = torch.randn(batch, 3, 13)
        want = functional.silu(functional.linear(x.relu(), layer.dense, layer.get_buffer("bias")))
        for run in (loaded, compiled):
            torch.testing.assert_close(run(x), want, rtol=1e-6, atol=1e-6)


def test_its_axis_rule_counts_the_tiles_and_freezes_what_they_mix() -> None:
    layer = Layer()
    exported = torch.export.export(layer, (torch.randn(4, 3, 13),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    program = PropagateAxes().run(Program(exported))
    assert not program.need("axes").unknown
    assert CostModel(program)().flops == 3 * layer.get_buffer("tiles").numel()
    assert {f.why for f in program.need("axes").frozen} >= {"its weight is stored as tiles"}


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, when inductor is imported
def test_inductor_compiles_it() -> None:
    x, _, _, arguments = case(10, 13, (4, 8))  # alone: what surrounds it would cost half a minute of C++

    def layer(x: Tensor) -> Tensor:
        return block_sparse_linear(x, *arguments, "gelu")

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_arguments_that_no_kernel_should_see_are_refused() -> None:
    x, _, _, (tiles, offsets, columns, bias, n) = case(10, 13, (4, 8))
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x, tiles, offsets, columns, bias, n, "relu"), "unknown activation"),
        ((x.half(), tiles, offsets, columns, bias, n, "none"), "the tiles are"),
        ((x, tiles, offsets.long(), columns, bias, n, "none"), "int32"),
        ((x, tiles, offsets, columns[:-1], bias, n, "none"), "no block CSR"),
        ((x, tiles, offsets, columns, bias, n + 4, "none"), "do not make"),
        ((x, tiles, offsets, columns, bias[:-1], n, "none"), "bias"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            block_sparse_linear(*arguments)


def test_everything_but_the_kernel_is_there_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import fxprune, fxprune.backends.triton.backend, fxprune.backends.triton.launch, torch\n"
        "import fxprune.backends.triton.tune, fxprune.target.tune\n"
        "print(torch.ops.fxprune.block_sparse_linear.default)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "fxprune.block_sparse_linear.default"
