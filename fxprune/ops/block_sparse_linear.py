"""``fxprune::block_sparse_linear``: a linear layer whose weight holds only some of its tiles."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn import functional

from .library import NAMESPACE, OPS, Op

ACTIVATIONS = ("none", "gelu", "silu")
KERNEL = "fxprune.backends.triton.launch"
"""The module whose ``launch`` runs the op on CUDA; imported when a CUDA tensor arrives, so that triton is optional."""


def pack(weight: Tensor, kept: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as tiles and a block CSR index: (tiles [n, BN, BK], offsets [rows + 1] int32, columns [n] int32).

    weight  [N, K];  kept: bool [rows, columns] with rows = ceil(N / BN), columns = ceil(K / BK);  tile: (BN, BK)

    Tiles lie row by row, columns ascending, and tiles at ragged borders are filled with zeros. Row i of the grid holds
    the tiles ``offsets[i] : offsets[i + 1]``; ``columns`` says where in K each of them stands.
    """
    (rows, columns), (bn, bk) = kept.shape, tile
    padded = functional.pad(weight.detach(), (0, columns * bk - weight.shape[1], 0, rows * bn - weight.shape[0]))
    tiles = padded.reshape(rows, bn, columns, bk).transpose(1, 2)[kept].contiguous()
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
    offsets[1:] = kept.sum(1).cumsum(0)
    return tiles, offsets, kept.nonzero()[:, 1].to(torch.int32)


def unpack(tiles: Tensor, offsets: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight [N, K] = ``shape`` that was packed, zero where no tile stands."""
    count, bn, bk = tiles.shape
    wide = -(-shape[1] // bk)
    rows = len(offsets) - 1
    row = torch.repeat_interleave(torch.arange(rows, device=tiles.device), offsets.diff().long(), output_size=count)
    grid = tiles.new_zeros(rows * wide, bn, bk)
    grid[row * wide + columns.long()] = tiles
    return grid.view(rows, wide, bn, bk).transpose(1, 2).reshape(rows * bn, wide * bk)[: shape[0], : shape[1]]


def reference(
    x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    """What the op computes, through the dense weight: ``act(x W^T + bias)``. [.., K] -> [.., out_features]

    x           [.., K], of the dtype of the tiles
    tiles, offsets, columns   see :func:`pack`; bias [out_features] or None
    activation  ``none``, ``gelu`` (exact, by erf) or ``silu``
    Law         equals the dense layer whose other tiles are zero
    """
    y = functional.linear(x, unpack(tiles, offsets, columns, (out_features, x.shape[-1])), bias)
    return functional.gelu(y) if activation == "gelu" else functional.silu(y) if activation == "silu" else y


def macs(x: torch.Size, tiles: torch.Size, *_shapes: torch.Size | None, **_options: object) -> int:
    """Multiply-accumulates of one sample: rows of ``x`` of one sample times what the tiles hold."""
    rows = 1
    for size in x[1:-1]:
        rows *= size
    return rows * tiles.numel()


def check(
    x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> None:
    """Raise ValueError for arguments that no kernel should see; values of the index are trusted (see :func:`pack`)."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}', known: {', '.join(ACTIVATIONS)}")
    if tiles.dim() != 3 or columns.shape != tiles.shape[:1] or offsets.dim() != 1:
        raise ValueError(
            f"tiles {list(tiles.shape)}, offsets {list(offsets.shape)} and columns {list(columns.shape)} "
            "are no block CSR"
        )
    if len(offsets) - 1 != -(-out_features // tiles.shape[1]):
        raise ValueError(f"{len(offsets) - 1} rows of tiles do not make {out_features} outputs")
    if x.dtype != tiles.dtype or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, the tiles are {tiles.dtype}")
    if offsets.dtype != torch.int32 or columns.dtype != torch.int32:
        raise ValueError("the index must be int32")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias has shape {list(bias.shape)}, expected [{out_features}]")


_SCHEMA = (
    "(Tensor x, Tensor tiles, Tensor offsets, Tensor columns, Tensor? bias, int out_features, str activation) -> Tensor"
)


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_linear", mutates_args=(), device_types="cpu", schema=_SCHEMA)
def block_sparse_linear(
    x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    """The op. Arguments as for :func:`reference`, which is its CPU kernel; on CUDA the Triton kernel runs.

    A custom op and not a composite of ATen ops, so that a graph keeps it whole down to the device that has the kernel.
    It is for inference: it has no gradient. What trains is the dense weight, before the tiles are packed.
    """
    check(x, tiles, offsets, columns, bias, out_features, activation)
    return reference(x, tiles, offsets, columns, bias, out_features, activation)


@block_sparse_linear.register_kernel("cuda")
def _(
    x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    check(x, tiles, offsets, columns, bias, out_features, activation)
    result: Tensor = importlib.import_module(KERNEL).launch(x, tiles, offsets, columns, bias, out_features, activation)
    return result


@block_sparse_linear.register_fake
def _(
    x: Tensor, tiles: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    check(x, tiles, offsets, columns, bias, out_features, activation)
    return x.new_empty((*x.shape[:-1], out_features))


OPS[f"{NAMESPACE}::block_sparse_linear"] = Op("block_sparse_linear", reference, macs)
