"""``y = act(x W^T + bias)`` with W stored as tiles and a block CSR index (see ``fxprune.ops.block_sparse_linear``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_sparse(  # type: ignore[no-untyped-def]
    x,
    tiles,
    offsets,
    columns,
    bias,
    y,
    m,
    n,
    k,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program makes BM rows of the BN outputs of one row of tiles: a product per tile, summed in fp32.

    x [m, k] contiguous, k a multiple of BK; tiles [t, BN, BK]; offsets [rows + 1], columns [t] int32; bias [n];
    y [m, n], rows y_stride apart. Grid: (rows of tiles, ceil(m / BM)); rows of tiles run fastest, so that what runs at
    one time reads the same rows of x. Reads behind the last row of x wrap around to its first ones; nothing of them is
    stored.
    """
    row = tl.program_id(0)
    here = tl.program_id(1) * BM + tl.arange(0, BM)
    outputs = row * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    x_rows = x + (here % m).to(tl.int64)[:, None] * k
    first = tl.load(offsets + row)
    w_tile = tiles + first.to(tl.int64) * (BN * BK) + tl.arange(0, BN)[None, :] * BK + inner[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(first, tl.load(offsets + row + 1)):
        at = tl.load(columns + i) * BK + inner
        total = tl.dot(tl.load(x_rows + at[None, :]), tl.load(w_tile), total, input_precision=PRECISION)
        w_tile += BN * BK
    if BIAS:
        total += tl.load(bias + outputs, mask=outputs < n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == "silu":
        total = total / (1.0 + tl.exp(-total))
    places = y + here.to(tl.int64)[:, None] * y_stride + outputs[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=(here[:, None] < m) & (outputs[None, :] < n))
