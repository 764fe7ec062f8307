"""Measure block-ELL on onnxruntime on this machine's CPU, against the same layer with its zeros in a dense weight."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import OptionError
from ...intake.capture import capture
from ...ir.linear_layers import live_tiles, matrices
from ...ir.program import Program
from ...ir.sparsity import grid, spread, tile_of
from ...process.environment import cpu_name
from ...process.silence import quiet
from ...target.block_table import BlockTable, Timing, make_table
from ...target.gate import SparseLayer
from ...target.timing import latency, session
from .block_ell import count_padded, replace_layers

FORM = "ell"


def measure(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    patterns: Sequence[str],
    densities: Sequence[float],
    dtype: str,
    on_case: Callable[[str, int, int], None],
    threads: int = 0,
    seconds: float = 0.5,
) -> BlockTable:
    """Medians of both forms, measured in turns, with random tiles. Arguments as for the kernel's ``measure``.

    The table's densities are those of the padded form: of what is multiplied, above the share that is kept.

    threads   of onnxruntime, 0 lets it choose;  seconds: per case

    Raises OptionError for a dtype that a CPU has no kernels for.
    """
    if dtype != "float32":
        raise OptionError(
            f"block-ELL is measured in float32, not in {dtype}",
            where="--dtype",
            why="onnxruntime computes half precision on a CPU by converting it",
            cure="`--dtype float32`",
        )
    cases, found = list(itertools.product(shapes, rows, patterns, densities)), []
    for number, ((n, k), m, pattern, density) in enumerate(cases):
        on_case(f"{n}x{k}, M={m}, tiles {pattern}, density {density:g}", number, len(cases))
        found.append(_case(n, k, m, pattern, density, threads, seconds))
    return make_table(cpu_name(), FORM, found)


def _case(n: int, k: int, m: int, pattern: str, density: float, threads: int, seconds: float) -> Timing:
    dense = layer(n, k, m, pattern, density)
    matrix = matrices(dense)[0]
    live = live_tiles(dense.tensors[matrix.parameter], tile_of(pattern))
    if bool(live.all()):
        raise OptionError(
            f"a density of {density:g} leaves no tile of {pattern} to drop in {n}x{k}",
            where="--density",
            cure="lower it",
        )
    one = SparseLayer(matrix, pattern, tile_of(pattern), live)
    sparse = replace_layers(dense, [one], "tune")
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: _session(program, Path(folder) / f"{name}.onnx", threads)
            for name, program in (("dense", dense), ("ell", sparse))
        }
        times = latency(
            {name: partial(s.run, None, {s.get_inputs()[0].name: x}) for name, s in running.items()}, seconds=seconds
        )
    multiplied = round(count_padded(one) / live.numel(), 4)  # what a layer of a plan is compared by as well
    return Timing(n, k, pattern, "float32", m, multiplied, times["dense"].median_ms, times["ell"].median_ms)


def layer(n: int, k: int, m: int, pattern: str, density: float) -> Program:
    """One linear layer on [m, k] with random tiles zeroed."""
    generator = torch.Generator().manual_seed(0)
    size = grid((n, k), tile_of(pattern))
    kept = torch.zeros(size[0] * size[1])
    kept[torch.randperm(len(kept), generator=generator)[: round(density * len(kept))]] = 1
    module = nn.Linear(k, n)
    with torch.no_grad():
        module.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
        module.weight *= spread(kept.view(size), (n, k), tile_of(pattern))
    return capture(module.eval(), (torch.randn(m, k, generator=generator),))


def _session(program: Program, path: Path, threads: int) -> Any:
    with quiet():
        model: Any = torch.onnx.export(program.exported, dynamo=True, opset_version=18, verbose=False)
        model.save(path)
    return session(path, threads)
