"""Stage 1: the tests marked ``gpu``, the kernel against fp64, and whole models against the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fxprune
from bench.gpu.cells import Cell, Record, Setting
from bench.gpu.models import build, call, move_inputs
from bench.record import describe_error
from fxprune.backends.triton.configurations import CONFIGURATIONS, usable
from fxprune.backends.triton.launch import launch
from fxprune.ops.block_sparse_linear import block_sparse_linear, pack, unpack
from fxprune.target.timing import session

ROOT = Path(__file__).resolve().parents[3]
TESTS_SECONDS = 240
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}  # of the largest output, as in the tests
SHAPES = {  # name: rows, outputs, inputs, share of the tiles that is kept, activation
    "even": (1024, 512, 512, 0.5, "none"),
    "ragged": (333, 200, 150, 0.5, "gelu"),
    "deit": (1576, 1536, 384, 0.25, "gelu"),
    "one row": (1, 384, 384, 0.5, "silu"),
    "empty rows": (200, 512, 256, -1.0, "none"),
    "no tile": (64, 256, 256, 0.0, "gelu"),
}
TOYS = {"ragged": (37, 50, 75, 0.5, "gelu"), "empty rows": (20, 150, 70, -1.0, "none")}
MODELS = ("deit_small", "bert_base", "resnet50", "llama_block")
RUNTIMES = ("eager", "inductor", "onnx")
CLOSE = 2e-3  # of the largest output: fp32 on a GPU, TF32 off, through a hundred layers


def cells(setting: Setting) -> list[Cell]:
    """The tests, then the kernel by dtype and tile, then models by runtime."""
    found = [Cell("tests marked gpu", partial(run_marked_tests, setting))]
    dtypes = ("float32", "float16") if setting.dry else tuple(DTYPES)
    tiles = [(32, 32)] if setting.dry else list(CONFIGURATIONS)
    for dtype in dtypes:
        for tile in tiles:
            name = f"kernel {dtype} {tile[0]}x{tile[1]}"
            found.append(Cell(name, partial(kernel_errors, setting, tile, dtype)))
    for runtime in RUNTIMES:
        for model in MODELS[::3] if setting.dry and runtime == "inductor" else MODELS:
            found.append(Cell(f"{model} {runtime}", partial(parity, setting, model, runtime)))
    return found


def run_marked_tests(setting: Setting) -> Record:
    """pytest's last line about the tests that are marked. A dry run collects them alone."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed: the cells below stand for its tests"}
    tests = ROOT / "tests"
    files = sorted(str(p) for p in tests.rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8"))
    options = ["-c", str(ROOT / "pyproject.toml"), "-m", "gpu", "-q", "-p", "no:cacheprovider", "-W", "default"]
    options += ["-o", "addopts=--strict-markers", *(["--collect-only"] if setting.dry else [])]
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(  # not in the root: its fxprune would hide the one that has passes and backends
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tests,
        env=outside,
        capture_output=True,
        text=True,
        check=False,
        timeout=TESTS_SECONDS,
    )
    lines = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()] or [""]
    if "ModuleNotFoundError" in done.stdout + done.stderr:  # what only tests need is not on such machines
        return {"skipped": f"the tests cannot be collected: {next(n for n in lines if 'ModuleNotFoundError' in n)}"}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"said": lines[-1], "ok": done.returncode == 0, "failed": failed[:20]}


def kernel_errors(setting: Setting, tile: tuple[int, int], dtype: str) -> Record:
    """Largest error of every configuration against fp64, per shape; ``ok``: within the tolerance of the tests."""
    shapes, by = TOYS if setting.dry else SHAPES, {}
    try:
        found = {name: kernel_error(setting, tile, DTYPES[dtype], *shape) for name, shape in shapes.items()}
    except Exception as error:
        if not setting.dry:
            raise
        by = {"by": f"the op's reference: Triton's interpreter fails here: {describe_error(error, 120)}"}
        found = {name: kernel_error(setting, tile, DTYPES[dtype], *shape, False) for name, shape in shapes.items()}
    return {"errors": found, "worst": max(found.values()), "ok": max(found.values()) < TOLERANCE[dtype], **by}


def kernel_error(
    setting: Setting,
    tile: tuple[int, int],
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    density: float,
    activation: str,
    kernel: bool = True,
) -> float:
    """Of the worst configuration, relative to the largest output. A density below zero keeps one row of tiles.

    kernel   False: of the op as the device has it, which on a CPU is its reference
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = -(-n // tile[0]), -(-k // tile[1])
    kept = torch.rand(rows, columns, generator=generator) < density
    if density < 0:
        kept[rows // 2] = True
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((m, k), (n, k), (n,)))
    packed = pack(weight, kept, tile)
    want = functional.linear(x.double(), unpack(*packed, (n, k)).double(), bias.double())
    want = {"none": want, "gelu": functional.gelu(want), "silu": functional.silu(want)}[activation]
    there = [t.to(setting.device) for t in (x, *packed, bias)]
    if kernel:
        made = [launch(*there, n, activation, one) for one in usable(tile, x.element_size())]
    else:
        made = [block_sparse_linear(*there, n, activation)]
    most = want.abs().max().clamp_min(1e-9)
    return max(float((got.cpu().double() - want).abs().max() / most) for got in made)


def parity(setting: Setting, model: str, runtime: str) -> Record:
    """A pruned model's output on the device against the same model's on the CPU, both fp32 without TF32."""
    module, batch = build(model, setting.dry)
    inputs = batch(2)
    made = fxprune.compile(module, inputs, flops=0.5, importance="l2", device="cpu", on_event=lambda event: None)
    with torch.no_grad():
        want = call(made.module, inputs)
        got = {"eager": _eager, "inductor": _inductor, "onnx": _onnx}[runtime](setting, made, inputs)
    if isinstance(got, str):
        return {"skipped": got}
    worst = float((got.cpu().double() - want.double()).abs().max() / want.double().abs().max())
    return {"worst": worst, "ok": worst < CLOSE, "macs": made.report["cost"]["ratio"]["flops"]}


def _eager(setting: Setting, made: Any, inputs: Any) -> Tensor:
    return call(made.module.to(setting.device), move_inputs(inputs, setting.device))


def _inductor(setting: Setting, made: Any, inputs: Any) -> Tensor | str:
    """The package that ``--target inductor`` writes."""
    from fxprune import registry

    backend = registry.target(f"inductor{{device={setting.device.type}}}")
    with tempfile.TemporaryDirectory() as folder:
        lowered = backend.lower(made.program, Path(folder))
        if lowered.missing:
            return "; ".join(lowered.missing)
        return lowered.run(_flat(made, inputs))[0]


def _onnx(setting: Setting, made: Any, inputs: Any) -> Tensor | str:
    """The file that ``--target onnx`` writes, by ONNX Runtime on the device."""
    import onnxruntime

    from fxprune import registry

    provider = "CPUExecutionProvider" if setting.dry else "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        return f"this ONNX Runtime has no {provider}"
    with tempfile.TemporaryDirectory() as folder:
        lowered = registry.target("onnx").lower(made.program, Path(folder))
        if setting.dry:
            running = session(lowered.payload)
        else:
            running = onnxruntime.InferenceSession(str(lowered.payload), providers=[provider])
        if running.get_providers()[0] != provider:
            return f"ONNX Runtime did not take {provider}"
        named = dict(zip((one.name for one in running.get_inputs()), _flat(made, inputs), strict=True))
        return torch.from_numpy(running.run(None, {name: t.numpy() for name, t in named.items()})[0])


def _flat(made: Any, inputs: Any) -> list[Tensor]:
    """Inputs in the order of the graph."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    flat: list[Tensor] = made.program.flatten(args, kwargs)
    return flat
