"""The block-sparse kernel against dense layers, on a GPU: layer by layer, and a whole DeiT-B.

    python tools/bench/kernel.py --out kernel.json [--dtype bfloat16] [--tiles 32x32,64x64] [--densities 0.25,0.5]

Shapes    the linear layers of DeiT-S, DeiT-B and BERT-base;  rows: 197, 197 x 8 and 197 x 64
Against   ``torch.nn.functional.linear`` in the same dtype; torch's BSR layer with the same tiles and its
          semi-structured layer (density 0.5 only), where this build has them: else the record says why not
Figures   median and quartiles (L2 flushed before every call), achieved TFLOP/s of what is kept, and the share of the
          floor: the larger of bytes over bandwidth and operations over peak, over the median. Peaks: data sheets
Whole     DeiT-B (timm, random weights, random tiles): dense, and with the layers that the measured table lets through
Targets   on an H200 in bfloat16 at M >= 1576: 1.6x over dense at density 0.5, 2.8x at 0.25 with the best tile; the
          whole model after the gate never below 0.95x. They are printed with what was reached

Without a CUDA device it says what is missing and stops with exit code 4. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.record import describe_error, write
from fxprune.backends.triton.configurations import CONFIGURATIONS, usable
from fxprune.backends.triton.launch import launch
from fxprune.backends.triton.tune import DTYPES, check_device, inputs, quartiles
from fxprune.errors import MissingDevice
from fxprune.ir.sparsity import spread, tile_of, two_of_four
from fxprune.target.block_table import Timing, make_table

SHAPES = {  # model: (out, in) of qkv or its parts, projection, and the two feed-forward layers
    "DeiT-S": ((1152, 384), (384, 384), (1536, 384), (384, 1536)),
    "DeiT-B": ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
    "BERT-base": ((768, 768), (3072, 768), (768, 3072)),
}
ROWS = (197, 197 * 8, 197 * 64)
DENSITIES = (0.1, 0.25, 0.5, 0.75)
PEAKS = {  # GPU name contains: (dense tensor-core TFLOP/s in half precision, memory TB/s)
    "H200": (989.0, 4.8),
    "H100": (989.0, 3.35),
    "A100": (312.0, 2.0),
    "L40S": (362.0, 0.864),
    "L4": (121.0, 0.3),
}
TARGETS = {0.5: 1.6, 0.25: 2.8}


def layer(n: int, k: int, m: int, tile: str, density: float, dtype: str, device: str) -> dict[str, Any]:
    """One shape: the dense layer, every configuration of the kernel, and torch's own sparse layers."""
    x, weight, bias, packed = inputs(n, k, m, tile, density, DTYPES[dtype])
    dense = list(quartiles(lambda: functional.linear(x, weight, bias)))
    times = {
        str(one): list(quartiles(lambda one=one: launch(x, *packed, bias, n, "none", one)))  # type: ignore[misc]
        for one in usable(tile_of(tile), x.element_size())
    }
    best = min(times, key=lambda one: times[one][1])
    kept = packed[0].numel()
    size = x.element_size()
    operations, moved = 2 * m * kept, size * (x.numel() + kept + m * n)
    record = {
        "n": n,
        "k": k,
        "m": m,
        "tile": tile,
        "density": density,
        "dtype": dtype,
        "dense_ms": dense,
        "kernel_ms": times[best],
        "configuration": best,
        "all": times,
        "ratio": dense[1] / times[best][1],
        "tflops": operations / times[best][1] / 1e9,
        "dense_tflops": 2 * m * n * k / dense[1] / 1e9,
        "bsr": _try(lambda: _bsr(x, weight, bias, packed, n, k, tile)),
    }
    if density == 0.5:
        record["semi_structured"] = _try(lambda: _semi_structured(x, weight, bias))
    peak = next((p for name, p in PEAKS.items() if name in device), None)
    if peak is not None and dtype != "float32":
        floor = max(operations / (peak[0] * 1e9), moved / (peak[1] * 1e9))
        record["share_of_floor"] = floor / times[best][1]
    return record


def _try(measure: Callable[[], Sequence[float]]) -> Any:
    """Quartiles, or why torch has no such layer here."""
    try:
        return list(measure())
    except Exception as error:  # torch raises anything where a layout or dtype is missing
        return describe_error(error)


def _bsr(
    x: Tensor, weight: Tensor, bias: Tensor, packed: tuple[Tensor, Tensor, Tensor], n: int, k: int, tile: str
) -> Sequence[float]:
    tiles, offsets, columns = packed
    bn, bk = tile_of(tile)
    sparse = torch.sparse_bsr_tensor(offsets.long(), columns.long(), tiles, (-(-n // bn) * bn, -(-k // bk) * bk))
    return list(quartiles(lambda: functional.linear(x, sparse, bias)))


def _semi_structured(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[float]:
    from torch.sparse import to_sparse_semi_structured

    sparse = to_sparse_semi_structured((weight * two_of_four(weight.abs())).contiguous())
    return list(quartiles(lambda: functional.linear(x, sparse, bias)))


def whole(records: Sequence[dict[str, Any]], dtype: str, tile: str, density: float, device: str) -> dict[str, Any]:
    """DeiT-B end to end at batch 1, 8 and 64: dense weights, and what the gate makes of the same weights."""
    import timm

    from fxprune.artifact.module import module_of
    from fxprune.backends.triton.legalize import UseKernels
    from fxprune.intake.capture import capture
    from fxprune.ir.linear_layers import matrices
    from fxprune.ir.pipeline import Pipeline
    from fxprune.ir.sparsity import grid
    from fxprune.passes.transform.sparsify_blocks import mask_tiles

    table = make_table(
        device,
        "kernel",
        [
            Timing(
                r["n"],
                r["k"],
                r["tile"],
                dtype,
                r["m"],
                r["density"],
                r["dense_ms"][1],
                r["kernel_ms"][1],
                r["configuration"],
            )
            for r in records
        ],
    )
    model = timm.create_model("deit_base_patch16_224").eval().to(DTYPES[dtype])
    found: dict[str, Any] = {"tile": tile, "density": density, "batches": {}}
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 8, 64):
        x = torch.randn(batch, 3, 224, 224, dtype=DTYPES[dtype])
        program = capture(model, (x,))
        masks = {}
        for matrix in matrices(program):
            if not matrix.dense:
                size = grid(matrix.shape, tile_of(tile))
                kept = torch.zeros(size[0] * size[1], dtype=torch.bool)
                kept[torch.randperm(len(kept), generator=generator)[: round(density * len(kept))]] = True
                masks[matrix.parameter] = matrix.store(spread(kept.view(size), matrix.shape, tile_of(tile)))
        zeroed = program.without_facts(exported=mask_tiles(program, masks))
        gate = UseKernels(table, device)
        quick, (gated,) = Pipeline((gate,)).apply(zeroed)
        here = x.cuda()
        times = {}
        for name, one in (("dense", zeroed), ("sparse", quick)):
            module = module_of(one.exported).eval().cuda()
            with torch.no_grad():
                times[name] = list(quartiles(lambda module=module, here=here: module(here)))  # type: ignore[misc]
        found["batches"][batch] = {
            **times,
            "ratio": times["dense"][1] / times["sparse"][1],
            "layers": sum(d.sparse for d in gated.record),
            "of": len(gated.record),
        }
    return found


def list_reached(records: Sequence[dict[str, Any]], deit: Sequence[dict[str, Any]]) -> list[str]:
    """Targets and what was reached: the worst shape with M >= 1576 at its best tile, the whole model at its worst."""
    lines = []
    for density, target in TARGETS.items():
        best: dict[tuple[int, int, int], float] = {}
        for r in records:
            if r["m"] >= 1576 and r["density"] == density:
                key = (r["n"], r["k"], r["m"])
                best[key] = max(best.get(key, 0.0), r["ratio"])
        if best:
            lines.append(
                f"density {density:g}: {min(best.values()):.2f}x to {max(best.values()):.2f}x, "
                f"target {target:g}x at every shape"
            )
    worst = min(b["ratio"] for one in deit for b in one["batches"].values())
    return [*lines, f"DeiT-B after the gate: {worst:.2f}x at the worst, target 0.95x"]


def main() -> int:
    """Measure. Exit code 4 without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return [w for w in text.split(",") if w]

    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--models", type=words, default=list(SHAPES))
    parser.add_argument("--tiles", type=words, default=[f"{n}x{k}" for n, k in CONFIGURATIONS])
    parser.add_argument("--densities", type=lambda t: [float(x) for x in words(t)], default=list(DENSITIES))
    args = parser.parse_args()
    try:
        device = check_device()
    except MissingDevice as missing:
        print(missing, file=sys.stderr)
        return missing.exit_code
    shapes = dict.fromkeys(shape for name in args.models for shape in SHAPES[name])
    records: list[dict[str, Any]] = []
    for n, k in shapes:
        for m in ROWS:
            for tile in args.tiles:
                for density in args.densities:
                    records.append(layer(n, k, m, tile, density, args.dtype, device))
                    r = records[-1]
                    print(
                        f"{n}x{k} M={m} {tile} density {density:g}: {r['ratio']:.2f}x, {r['tflops']:.0f} TFLOP/s",
                        flush=True,
                    )
        write(args.out, "kernel", layers=records)
    deit = [whole(records, args.dtype, args.tiles[-1], density, device) for density in (0.25, 0.5)]
    write(args.out, "kernel", layers=records, deit_b=deit, targets=list_reached(records, deit))
    print(*list_reached(records, deit), sep="\n")
    return 0
