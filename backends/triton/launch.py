"""From the op's arguments to a launch of the kernel. Imported when a CUDA tensor arrives at the op."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import LoweringError
from .configurations import CONFIGURATIONS, Configuration, default


def launch(x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, out_features: int,
           activation: str, configuration: Configuration | None = None) -> Tensor:
    """``fxprune::block_sparse_linear`` by the kernel; the arguments have been checked.

    configuration   by default the one that :func:`default` takes for these sizes

    Raises LoweringError for a tile the kernel has no configuration for, and without triton.
    """
    tile = (tiles.shape[1], tiles.shape[2])
    if tile not in CONFIGURATIONS:
        raise LoweringError(f"there is no kernel for tiles of {tile[0]}x{tile[1]}", where="block_sparse_linear",
                            cure="use " + ", ".join(f"{n}x{k}" for n, k in CONFIGURATIONS))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), out_features)
    if y.numel():
        write(flat, tiles, offsets, columns, bias, y, activation, configuration or default(len(flat), tile))
    return y.view(*x.shape[:-1], out_features)


def write(x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, y: Tensor, activation: str,
          configuration: Configuration) -> None:
    """Run the kernel on x [m, k] into y [m, n], whose rows may lie further apart than n."""
    try:
        from .kernels.block_sparse import block_sparse
    except ModuleNotFoundError as error:
        raise LoweringError("block-sparse layers on a GPU need triton", where="block_sparse_linear", why=str(error),
                            cure="pip install 'fxprune[triton]'") from error
    (m, k), (_, bn, bk) = x.shape, tiles.shape
    grid = (len(offsets) - 1, -(-m // configuration.rows))
    block_sparse[grid](
        x, tiles, offsets, columns, tiles if bias is None else bias, y, m, y.shape[1], k, y.stride(0),
        BM=configuration.rows, BN=bn, BK=bk, ACTIVATION=activation, BIAS=bias is not None, RAGGED=k % bk != 0,
        PRECISION=precision(x.dtype), num_warps=configuration.warps, num_stages=configuration.stages)


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: ``tf32`` where torch's own switch allows it, else ``ieee`` (no tensor cores)."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
