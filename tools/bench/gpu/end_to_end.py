"""Stage 3: whole models, dense against pruned, by the runtimes that people deploy, and budgets of latency."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fxprune
from bench.gpu.cells import Cell, Record, Setting
from bench.gpu.models import Inputs, build, call, move_inputs
from fxprune.target.timing import sample_times

MODELS = ("deit_small", "bert_base", "resnet50")
RATIOS, BATCHES = (0.5, 0.35), (1, 8, 64)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BUDGETS, EASY, MISS = (0.7, 0.5), 0.9, 0.05
SECONDS, WARM = 1.5, 3
Call = Callable[[], Any]


def cells(setting: Setting) -> list[Cell]:
    """Eager with CUDA graphs first, then budgets, then what must be compiled."""
    dtypes = ("bfloat16",) if setting.dry else tuple(DTYPES)
    found = [
        Cell(f"{model} {dtype} {runtime}", partial(shares, setting, model, dtype, runtime))
        for runtime in ("graphs", "inductor")
        for model in (MODELS[: 2 if runtime == "graphs" else 1] if setting.dry else MODELS)
        for dtype in (dtypes if runtime == "graphs" else dtypes[:1])
    ]
    at = len([c for c in found if c.name.endswith("graphs")])
    ratios = (EASY,) if setting.dry else BUDGETS
    met = [Cell(f"deit_small latency {ratio:g}", partial(budget, setting, "deit_small", ratio)) for ratio in ratios]
    engines = [Cell(f"{model} float16 trt", partial(engine, setting, model)) for model in MODELS[:2]]
    return [*found[:at], *met, *engines, *found[at:]]


def shares(setting: Setting, name: str, dtype: str, runtime: str) -> Record:
    """Milliseconds of the dense and the pruned model in turns, by batch, and the realised share of the saved MACs:
    the speed-up divided by dense MACs / MACs."""
    module, batch = build(name, setting.dry)
    models, macs = {"dense": module}, {}
    for ratio in RATIOS[:1] if setting.dry else RATIOS:
        made = fxprune.compile(module, batch(2), flops=ratio, importance="l2", on_event=lambda event: None)
        models[f"{ratio:g}"], macs[f"{ratio:g}"] = made.module, made.report["cost"]["ratio"]["flops"]
    there = {key: one.to(setting.device, DTYPES[dtype]) for key, one in models.items()}
    batches = {}
    for size in BATCHES[:1] if setting.dry else BATCHES:
        inputs = move_inputs(batch(size), setting.device, DTYPES[dtype])
        calls = {key: _calling(setting, one, inputs, runtime) for key, one in there.items()}
        ms = _medians(calls)
        told = {
            key: {"ms": ms[key], "ratio": ms[key] / ms["dense"], "realised": macs[key] * ms["dense"] / ms[key]}
            for key in macs
        }
        batches[str(size)] = {"dense_ms": ms["dense"], **told}
    return {"macs": macs, "batches": batches}


def _calling(setting: Setting, module: Any, inputs: Inputs, runtime: str) -> Call:
    """A call of the module that ends when its result is there."""
    if runtime == "inductor":
        module = torch.compile(module)
    with torch.no_grad():
        for _ in range(WARM):
            call(module, inputs)
    if runtime == "graphs" and not setting.dry:
        return _graph(setting, module, inputs)

    def run() -> None:
        with torch.no_grad():
            call(module, inputs)
        setting.wait()

    return run


def _graph(setting: Setting, module: Any, inputs: Inputs) -> Call:
    """The module's launches, recorded once and played at every call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARM):
            call(module, inputs)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(recorded):
        call(module, inputs)

    def run() -> None:
        recorded.replay()
        setting.wait()

    return run


def _medians(calls: dict[str, Call]) -> dict[str, float]:
    """Milliseconds of each, timed in turns."""
    samples, _ = sample_times(calls, seconds=SECONDS, warmup=WARM, rounds=200)
    return {name: sorted(values)[len(values) // 2] for name, values in samples.items()}


def budget(setting: Setting, name: str, ratio: float) -> Record:
    """``--latency RATIO`` on the device, eager: what was predicted and what the plan takes. To reach: within 5 %."""
    module, batch = build(name, setting.dry)
    inputs = move_inputs(batch(2), setting.device)
    made = fxprune.compile(
        module.to(setting.device),
        inputs,
        latency=ratio,
        batch=4 if setting.dry else 64,
        importance="l2",
        on_event=lambda event: None,
    )
    told = made.report["latency"]
    achieved = told["achieved_ratio"]
    return {
        "macs": made.report["cost"]["ratio"]["flops"],
        "predicted": told["predicted_ms"] / told["dense_ms"],
        "achieved": achieved,
        "miss": achieved / ratio - 1,
        "ok": abs(achieved / ratio - 1) <= MISS,
    }


def engine(setting: Setting, name: str) -> Record:
    """The ``trt`` target in float16: dense and pruned engines in turns."""
    import importlib.util

    from fxprune import registry
    from fxprune.request.request import Request
    from fxprune.target.clock import SURELY, Clock

    if importlib.util.find_spec("torch_tensorrt") is None and importlib.util.find_spec("tensorrt") is None:
        return {"skipped": "TensorRT is not installed"}
    if setting.dry:
        return {"skipped": "an engine needs the GPU it is built for"}
    module, batch = build(name, setting.dry)
    inputs, backend, batches = batch(2), registry.target("trt{dtype=fp16}"), {}
    dense = fxprune.compile(module, inputs, plan=_nothing(module, inputs), on_event=lambda event: None).program
    small = fxprune.compile(module, inputs, flops=RATIOS[0], importance="l2", on_event=lambda event: None)
    macs = small.report["cost"]["ratio"]["flops"]
    assert Request(target="trt{dtype=fp16}").backend.name == backend.name
    for size in BATCHES:
        with Clock(backend, dense, size, 0, SECONDS, SURELY) as clock:
            read = clock.read(small.program)
        batches[str(size)] = {
            "dense_ms": read.dense_ms,
            "ms": read.ms,
            "ratio": read.ratio,
            "realised": macs / read.ratio,
        }
    return {"macs": {"0.5": macs}, "batches": batches}


def _nothing(module: Any, inputs: Inputs) -> Any:
    """The plan that cuts nothing."""
    from fxprune.ir.plan import CompressionPlan

    return CompressionPlan({})
