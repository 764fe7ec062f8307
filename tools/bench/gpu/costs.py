"""Stage 4: what it takes to score, search and repair on the GPU: seconds and peak memory."""

from __future__ import annotations

import time
from functools import partial

import torch

import fxprune
from bench.gpu.cells import Cell, Record, Setting
from bench.gpu.models import build
from bench.record import MIB, peak_memory
from fxprune.data.batch import Batch, Calibration

RUNS = {  # model: samples, and the seconds that it may take
    "minilm": (1024, 10.0),
    "vit_base": (1024, 60.0),
    "bert_base": (1024, None),
    "llama_1b": (128, 300.0),
}
BATCH, TOY = 32, 64


def cells(setting: Setting) -> list[Cell]:
    """One a model, the smallest first."""
    return [Cell(model, partial(compile_timed, setting, model, *about)) for model, about in RUNS.items()]


def compile_timed(setting: Setting, name: str, samples: int, most: float | None) -> Record:
    """``fxprune.compile`` at half of the MACs on random inputs, from a model in memory to a result in memory."""
    module, make = build(name, setting.dry)
    count = TOY if setting.dry else samples
    batches = tuple(_batch(make(BATCH)) for _ in range(count // BATCH))
    if not setting.dry:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    made = fxprune.compile(
        module,
        make(2),
        flops=0.5,
        data=Calibration(batches, "random"),
        device=setting.device.type,
        on_event=lambda event: None,
    )
    seconds = time.perf_counter() - started
    passes: dict[str, float] = {}
    for one in made.report["passes"]:
        passes[one["name"]] = round(passes.get(one["name"], 0.0) + one["seconds"], 2)
    return {
        "samples": count,
        "seconds": seconds,
        "most": most,
        "ok": setting.dry or most is None or seconds <= most,
        "gpu_mib": 0 if setting.dry else torch.cuda.max_memory_allocated() // MIB,
        "process_mib": peak_memory() // MIB,
        "weights_mib": sum(p.nbytes for p in module.parameters()) // MIB,
        "macs": made.report["cost"]["ratio"]["flops"],
        "slowest": dict(sorted(passes.items(), key=lambda item: -item[1])[:6]),
    }


def _batch(inputs: dict[str, torch.Tensor] | torch.Tensor) -> Batch:
    return Batch((), inputs) if isinstance(inputs, dict) else Batch((inputs,))
