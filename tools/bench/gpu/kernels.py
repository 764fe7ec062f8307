"""Stage 2: the kernel table. What it measures is tools/bench/blocks/kernel.py's; here it has a time and an order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.blocks import kernel
from bench.gpu.cells import Cell, Record, Setting
from bench.gpu.results import Results
from bench.record import describe_error

DTYPE = "bfloat16"
DENSITIES, TILES = (0.5, 0.25), ("128x64", "64x64", "32x32")
ROWS = tuple(sorted(kernel.ROWS, reverse=True))  # the target is about many rows
TOY = (64, 64, 32, "32x32", 0.5)


def cells(setting: Setting) -> list[Cell]:
    """The ceilings of the chip, then layers with the most rows first, then the whole model after the gate."""
    ceilings = Cell("ceilings", partial(_ceilings, setting))
    if setting.dry:
        return [ceilings, Cell("layer 64x64 M=32 32x32 0.5 float32", partial(_layer, setting, *TOY, "float32"))]
    shapes = dict.fromkeys(shape for shapes in kernel.SHAPES.values() for shape in shapes)
    found = [
        Cell(f"layer {n}x{k} M={m} {tile} {density:g} {DTYPE}", partial(_layer, setting, n, k, m, tile, density, DTYPE))
        for m, density, tile, (n, k) in itertools.product(ROWS, DENSITIES, TILES, shapes)
    ]
    whole = [
        Cell(f"DeiT-B after the gate {t} {d:g}", partial(_whole, setting, t, d)) for d in DENSITIES for t in TILES[:2]
    ]
    return [ceilings, *found, *whole]


_reached: dict[str, kernel.Ceiling] = {}


def _ceiling(setting: Setting, dtype: str) -> kernel.Ceiling:
    """What this device reaches, measured once a process: a run that goes on measures it anew."""
    if dtype not in _reached:
        size = 64 if setting.dry else 8192
        _reached[dtype] = kernel.ceiling(dtype, setting.device.type, _timer(setting), size)
    return _reached[dtype]


def _ceilings(setting: Setting) -> Record:
    dtypes = ("float32",) if setting.dry else ("bfloat16", "float16", "float32")
    return {name: dict(zip(("tflops", "tbytes"), _ceiling(setting, name), strict=True)) for name in dtypes}


def _layer(setting: Setting, n: int, k: int, m: int, tile: str, density: float, dtype: str) -> Record:
    reached = _ceiling(setting, dtype)
    try:
        return kernel.layer(n, k, m, tile, density, dtype, reached, setting.device.type, _timer(setting))
    except Exception as error:
        if not setting.dry:
            raise
        return {"skipped": f"Triton's interpreter fails here: {describe_error(error, 120)}"}


def _timer(setting: Setting) -> Callable[[Callable[[], Tensor]], Iterator[float]]:
    """Quartiles of a call: Triton's on a GPU, three calls by the clock in a dry run."""
    return _by_clock if setting.dry else kernel.quartiles


def _by_clock(function: Callable[[], Tensor]) -> Iterator[float]:
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - started))
    yield from sorted(taken)


def targets(records: list[Record]) -> list[str]:
    """Sentences: what was reached of what is wanted."""
    layers = [r for r in records if "kernel_ms" in r]
    return kernel.list_reached(layers, [r for r in records if "batches" in r])


def _whole(setting: Setting, tile: str, density: float) -> Record:
    """DeiT-B end to end with what the gate lets through of the layers that were measured."""
    measured = [r for r in Results(setting.out / "kernels.json").records if "kernel_ms" in r and r["tile"] == tile]
    return kernel.whole(measured, DTYPE, tile, density, torch.cuda.get_device_name())
