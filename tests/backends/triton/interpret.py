"""Run by test_kernel.py in a process of its own with TRITON_INTERPRET=1: the kernel against fp64, case by case.

Prints one JSON object: case -> {"error": largest relative error, "guard": whether everything around y is untouched}.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.backends.triton.configurations import CONFIGURATIONS
from fxprune.backends.triton.launch import launch, write
from fxprune.ops.block_sparse_linear import pack, unpack

GUARD = 1234.0
CASES: dict[str, tuple[int, int, int, tuple[int, int], float, torch.dtype, str, bool]] = {
    # name: m, n, k, tile, density, dtype, activation, bias
    "even": (64, 64, 64, (32, 32), 0.5, torch.float32, "none", True),
    "ragged m": (37, 64, 64, (32, 32), 0.5, torch.float32, "none", True),
    "ragged n": (64, 50, 64, (16, 16), 0.5, torch.float32, "gelu", True),
    "ragged k": (64, 64, 75, (16, 32), 0.5, torch.float32, "silu", False),
    "all ragged": (70, 45, 51, (32, 16), 0.5, torch.float32, "gelu", True),
    "all ragged half": (70, 45, 51, (32, 32), 0.5, torch.float16, "gelu", True),
    "half silu": (33, 64, 128, (64, 64), 0.7, torch.float16, "silu", True),
    "half no bias": (65, 40, 40, (16, 16), 0.5, torch.float16, "none", False),
    "empty rows": (20, 96, 64, (32, 32), -1.0, torch.float32, "none", True),
    "no tile": (20, 48, 64, (16, 16), 0.0, torch.float32, "gelu", True),
    "one tile": (5, 16, 16, (16, 16), 1.0, torch.float16, "none", True),
    "one row": (1, 64, 64, (32, 32), 0.5, torch.float32, "none", True),
    "largest tile": (70, 150, 100, (128, 64), 0.5, torch.float16, "none", True),
    "full": (40, 64, 64, (32, 16), 1.0, torch.float16, "none", False),
}


def run(
    m: int, n: int, k: int, tile: tuple[int, int], density: float, dtype: torch.dtype, activation: str, bias: bool
) -> dict[str, Any]:
    rows, columns = math.ceil(n / tile[0]), math.ceil(k / tile[1])
    kept = torch.rand(rows, columns) < density
    if density < 0:  # only the middle row of tiles holds anything
        kept[rows // 2] = True
    x, b = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if bias else None
    packed = pack(torch.randn(n, k).to(dtype), kept, tile)
    dense = unpack(*packed, (n, k)).double()
    want = functional.linear(x.double(), dense, None if b is None else b.double())
    want = {"none": want, "gelu": functional.gelu(want), "silu": functional.silu(want)}[activation]
    errors, untouched = [], True
    for configuration in CONFIGURATIONS[tile]:
        around = torch.full((m + 3, n + 5), GUARD, dtype=dtype)
        y = around[1 : m + 1, 2 : n + 2]
        write(x, *packed, b, y, activation, configuration)
        errors.append(_error(y, want))
        around[1 : m + 1, 2 : n + 2] = GUARD
        untouched &= bool((around == GUARD).all())
    errors.append(_error(launch(x.view(1, m, k), *packed, b, n, activation)[0], want))
    return {"error": max(errors), "guard": untouched}


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-9))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({name: run(*case) for name, case in CASES.items()}))
