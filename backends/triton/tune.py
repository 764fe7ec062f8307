"""Measure the kernel on this machine's GPU: every configuration at every shape, against the dense layer."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import MissingDevice, OptionError
from ...ir.sparsity import grid, tile_of
from ...ops.block_sparse_linear import pack
from ...target.block_table import BlockTable, Timing, make_table
from ...target.gate import cuda_name
from .configurations import CONFIGURATIONS, usable
from .launch import launch

FORM = "kernel"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def measure(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    patterns: Sequence[str],
    densities: Sequence[float],
    dtype: str,
    on_case: Callable[[str, int, int], None],
) -> BlockTable:
    """Medians of the best configuration and of ``torch.nn.functional.linear`` in the same dtype, with random tiles.

    shapes   (out, in);  rows: M;  on_case is told (words, cases done, cases in all)

    Raises MissingDevice without a CUDA device, or where triton cannot be imported; OptionError for unknown words.
    """
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{dtype}'", where="--dtype", cure="known: " + ", ".join(DTYPES))
    for pattern in patterns:
        if tile_of(pattern) not in CONFIGURATIONS:
            raise OptionError(
                f"there is no kernel for tiles of {pattern}",
                where="--blocks",
                cure="known: " + ", ".join(f"{n}x{k}" for n, k in CONFIGURATIONS),
            )
    device = check_device()
    cases = list(itertools.product(shapes, rows, patterns, densities))
    found = []
    for number, ((n, k), m, pattern, density) in enumerate(cases):
        on_case(f"{n}x{k}, M={m}, tiles {pattern}, density {density:g}", number, len(cases))
        found.append(_case(n, k, m, pattern, density, dtype))
    return make_table(device, FORM, found)


def check_device() -> str:
    """The GPU's name. Raises MissingDevice saying what is missing."""
    device = cuda_name()
    if not device:
        raise MissingDevice(
            "there is no CUDA device to measure on",
            where="fxprune tune --target triton",
            why="torch.cuda.is_available() is False"
            + ("" if torch.version.cuda else ": this torch is built for CPUs only"),
            cure="run it on a machine with an NVIDIA GPU and a CUDA build of torch",
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise MissingDevice(
            "triton cannot be imported",
            where="fxprune tune --target triton",
            why=str(error),
            cure="pip install 'fxprune[triton]'",
        ) from None
    return device


def _case(n: int, k: int, m: int, pattern: str, density: float, dtype: str) -> Timing:
    x, weight, bias, packed = inputs(n, k, m, pattern, density, DTYPES[dtype])
    dense = median(lambda: functional.linear(x, weight, bias))
    times = {
        one: median(lambda one=one: launch(x, *packed, bias, n, "none", one))  # type: ignore[misc]
        for one in usable(tile_of(pattern), x.element_size())
    }
    best = min(times, key=lambda one: times[one])
    return Timing(n, k, pattern, dtype, m, density, round(dense, 5), round(times[best], 5), str(best))


def inputs(
    n: int, k: int, m: int, pattern: str, density: float, dtype: torch.dtype, device: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """x, dense weight, bias and packed tiles on the device; which tiles are kept is random, as many in all as asked."""
    generator = torch.Generator().manual_seed(0)
    size = grid((n, k), tile_of(pattern))
    kept = torch.zeros(size[0] * size[1], dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=generator)[: round(density * len(kept))]] = True
    weight = torch.randn(n, k, generator=generator).to(device, dtype) / k**0.5
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    bias = torch.zeros(n, dtype=dtype, device=device)
    return x, weight, bias, pack(weight, kept.view(size).to(device), tile_of(pattern))


def median(function: Callable[[], Tensor]) -> float:
    """Median of one call in milliseconds, the L2 cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=25, rep=100, return_mode="median"))


def quartiles(function: Callable[[], Tensor]) -> Iterator[float]:
    """Lower quartile, median and upper quartile of one call in milliseconds."""
    from triton.testing import do_bench

    yield from map(float, do_bench(function, warmup=25, rep=100, quantiles=[0.25, 0.5, 0.75]))
