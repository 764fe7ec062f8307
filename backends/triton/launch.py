"""From the op's arguments to a launch of the kernel. Imported when a CUDA tensor arrives at the op."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import LoweringError
from ...target.block_table import BlockTable, table_for
from .configurations import CONFIGURATIONS, Configuration, default


def launch(
    x: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    configuration: Configuration | None = None,
) -> Tensor:
    """``fxprune::block_sparse_linear`` by the kernel; the arguments have been checked.

    configuration   by default the one that was measured to be the fastest for these sizes on this GPU, else the one
                    that :func:`default` takes

    Raises LoweringError for a tile the kernel has no configuration for, and without triton.
    """
    tile = (tiles.shape[1], tiles.shape[2])
    if tile not in CONFIGURATIONS:
        raise LoweringError(
            f"there is no kernel for tiles of {tile[0]}x{tile[1]}",
            where="block_sparse_linear",
            cure="use " + ", ".join(f"{n}x{k}" for n, k in CONFIGURATIONS),
        )
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), out_features)
    if y.numel():
        if configuration is None:
            device = torch.cuda.get_device_name(x.device) if x.is_cuda else ""
            cells = (len(offsets) - 1) * -(-x.shape[-1] // tile[1])
            dtype = str(x.dtype).removeprefix("torch.")
            configuration = fastest(
                device, out_features, x.shape[-1], f"{tile[0]}x{tile[1]}", dtype, len(flat), len(tiles) / cells
            ) or default(len(flat), tile, x.element_size())
        write(flat, tiles, offsets, columns, bias, y, activation, configuration)
    return y.view(*x.shape[:-1], out_features)


def write(
    x: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    configuration: Configuration,
) -> None:
    """Run the kernel on x [m, k] into y [m, n], whose rows may lie further apart than n."""
    try:
        from .kernels.block_sparse import block_sparse
    except ModuleNotFoundError as error:
        raise LoweringError(
            "block-sparse layers on a GPU need triton",
            where="block_sparse_linear",
            why=str(error),
            cure="pip install 'fxprune[triton]'",
        ) from error
    _, bn, bk = tiles.shape
    if x.shape[1] % bk:  # zeros in place of a mask in the kernel, which would cost registers at every product
        x = functional.pad(x, (0, -x.shape[1] % bk))
    m, k = x.shape
    grid = (len(offsets) - 1, -(-m // configuration.rows))
    block_sparse[grid](
        x,
        tiles,
        offsets,
        columns,
        tiles if bias is None else bias,
        y,
        m,
        y.shape[1],
        k,
        y.stride(0),
        BM=configuration.rows,
        BN=bn,
        BK=bk,
        ACTIVATION=activation,
        BIAS=bias is not None,
        PRECISION=precision(x.dtype),
        num_warps=configuration.warps,
        num_stages=configuration.stages,
    )


@functools.lru_cache(maxsize=4096)
def fastest(device: str, n: int, k: int, pattern: str, dtype: str, m: int, density: float) -> Configuration | None:
    """What ``fxprune tune`` found on this GPU for this shape, or None. Read once per process."""
    table = _table(device) if device else None
    timing = table.find(n, k, pattern, dtype, m, density) if table is not None else None
    return Configuration.parse(timing.configuration) if timing is not None and timing.configuration else None


@functools.lru_cache(maxsize=8)
def _table(device: str) -> BlockTable | None:
    return table_for(device, "kernel")


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: ``tf32`` where torch's own switch allows it, else ``ieee`` (no tensor cores)."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
