"""What a GPU shows of this project, in one command.

    python tools/bench/gpu.py [--out build/gpu] [--only correctness,kernels] [--dry-run] [--again]

Needs  a source checkout and what such machines have: torch with CUDA, triton; timm, transformers, onnx, onnxruntime,
       pytest and TensorRT where they are there (a record says what is not). Nothing is installed, nothing fetched
Stages environment   driver, clocks, versions
       correctness   under 8 minutes: the tests marked gpu; the block-sparse kernel against fp64 in fp32, fp16 and bf16;
                     DeiT-S, BERT-base, ResNet-50 and a Llama-like block by eager, inductor and ONNX Runtime against the
                     CPU
       kernels       the kernel at its best configuration beside cuBLAS, torch's BSR and 2:4; achieved TFLOP/s, share of
                     what the chip reaches in this run
       end_to_end    dense against 0.5 and 0.35 of the MACs, batch 1, 8 and 64, CUDA graphs, inductor, TensorRT;
                     realised share; budgets of latency
       costs         seconds and peak memory of scoring and repairing MiniLM, ViT-B, BERT-base and a language model of
                     1.1 billion parameters
Time   25 minutes in all on a data-centre GPU: each stage has a share of them. What it does not reach is left: the same
       command goes on there, also after Ctrl-C or a crash. A cell in which the process died is not tried again
Writes one JSON a stage, and gpu.md, a page of them

--dry-run plans every stage (what a GPU would be asked) and runs it at toy size on the CPU, the kernel in Triton's
interpreter; it says what that leaves out. Exit code 0 when every stage is complete and within its targets, 1 when one
is not, 4 without a CUDA device.

It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu import correctness, costs, end_to_end, environment, kernels
from bench.gpu.cells import Setting, Stage
from bench.gpu.page import write_page
from bench.gpu.results import Results
from bench.lists import names
from bench.record import command, describe_error

STAGES = (
    Stage("environment", "The machine", 60, environment.cells, ("chip", "driver_version", "capability", "cuda_build",
          "clocks.max.sm", "clocks.sm", "power.limit", "memory.total", "providers"),
          ("driver and clocks of a GPU",)),
    Stage("correctness", "Correctness", 480, correctness.cells, ("worst", "ok", "said", "macs", "by"),
          ("the tests marked gpu (they are collected)", "bfloat16 in the kernel (the interpreter's is wrong)",
           "the compiled kernel: Triton's interpreter ran it", "CUDA in eager, inductor and ONNX Runtime: their CPU "
           "backends ran"), interpreted=True),
    Stage("kernels", "The kernel", 330, kernels.cells, ("dense_ms", "kernel_ms", "ratio", "configuration", "tflops",
          "dense_tflops", "share_of_floor", "bsr", "semi_structured", "batches"),
          ("every time: the interpreter's says nothing", "the whole model after the gate"), interpreted=True),
    Stage("end_to_end", "End to end", 360, end_to_end.cells, ("macs", "batches", "predicted", "achieved", "miss", "ok"),
          ("CUDA graphs (plain calls ran)", "TensorRT", "float16, batches of 8 and 64, 0.35 of the MACs")),
    Stage("costs", "What compiling costs", 270, costs.cells, ("samples", "seconds", "most", "ok", "gpu_mib",
          "process_mib", "weights_mib", "macs", "slowest"), ("the GPU's memory", "transfers to the device")),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
DRY_SECONDS = 1800
GRACE = 60  # seconds that a cell may take beyond its stage's time
AGAIN = 75  # exit code of a stage whose device is lost to it: a new process goes on
TARGETS = {"kernels": kernels.targets}


def run_stage(stage: Stage, setting: Setting, seconds: float) -> int:
    """All cells that are not there yet, in this process, as far as the time goes. 0, or AGAIN."""
    results, begun = Results(stage.path(setting.out)), time.perf_counter()
    planned = stage.cells(setting)
    missing = [cell for cell in planned if not results.has(cell.name)]
    for number, cell in enumerate(missing):
        if time.perf_counter() - begun > seconds:
            results.close(cells=len(planned), left=f"{len(missing) - number} cells left: the time is over")
            return 0
        results.begin(cell.name)
        started = time.perf_counter()
        try:
            found, lost = dict(cell.run()), False
        except Exception as error:  # whatever a cell meets is its result
            found, lost = {"error": describe_error(error)}, "CUDA error" in str(error)
        results.end({"took": round(time.perf_counter() - started, 1), **found})
        print(f"{stage.name}: {cell.name}: {_line(found)}", flush=True)
        if lost:  # every later call of this process would fail as well
            return AGAIN
        if not setting.dry:
            torch.cuda.empty_cache()
    about = {"targets": TARGETS[stage.name](results.records)} if stage.name in TARGETS else {}
    results.close(cells=len(planned), left="complete", **about)
    return 0


def _line(found: dict[str, object]) -> str:
    shown = {k: v for k, v in found.items() if isinstance(v, str | int | float | bool)}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())[:200]


def in_processes(stage: Stage, setting: Setting, again: bool) -> None:
    """The stage in a process of its own, and in another where that one died, until its time is over."""
    path = stage.path(setting.out)
    if again:
        path.unlink(missing_ok=True)
    end = time.perf_counter() + (DRY_SECONDS if setting.dry else stage.seconds)
    asked = [*command("gpu"), "--stage", stage.name, "--out", str(setting.out), *(["--dry-run"] if setting.dry else [])]
    outside = {**os.environ, **({"TRITON_INTERPRET": "1"} if setting.dry and stage.interpreted else {})}
    while (left := end - time.perf_counter()) > 0:
        why = ""
        try:
            code = subprocess.run(
                [*asked, "--seconds", str(left)], env=outside, check=False, timeout=left + GRACE
            ).returncode
        except subprocess.TimeoutExpired:
            code, why = -1, "it did not end in time"
        if code == 0:
            return
        results = Results(path)
        if results.running:
            results.end({"error": why or f"the process died with exit code {code}"})
        elif code != AGAIN:
            results.close(left=f"the process died with exit code {code} before its first cell")
            return


def plan(setting: Setting) -> list[str]:
    """What a GPU would be asked, stage by stage."""
    whole, lines = Setting(setting.out, dry=False), []
    for stage in STAGES:
        planned = [cell.name for cell in stage.cells(whole)]
        lines.append(f"{stage.name}: {len(planned)} cells in {stage.seconds} s: {planned[0]}, .., {planned[-1]}")
    return lines


def verdict(stages: Sequence[Stage], out: Path) -> list[str]:
    """What is not as it should be, a sentence each."""
    found = []
    for stage in stages:
        results = Results(stage.path(out))
        if results.about.get("left") != "complete":
            found.append(f"{stage.name}: {results.about.get('left', 'not begun')}")
        for record in results.records:
            if "error" in record:
                found.append(f"{stage.name}: {record['cell']}: {record['error']}")
            elif record.get("ok") is False:
                found.append(f"{stage.name}: {record['cell']}: not within its target")
    return found


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=None, help="default: build/gpu, of a dry run build/gpu-dry")
    made.add_argument("--only", type=names(BY_NAME), default=list(BY_NAME), help="these stages")
    made.add_argument("--dry-run", action="store_true", help="plan, then run at toy size on the CPU")
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    made.add_argument("--stage", choices=list(BY_NAME), help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, write the page, say what is not as it should be."""
    args = parser().parse_args(argv)
    setting = Setting(args.out or Path("build/gpu-dry" if args.dry_run else "build/gpu"), args.dry_run)
    if args.stage:
        return run_stage(BY_NAME[args.stage], setting, args.seconds)
    if not args.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device that PyTorch can use; --dry-run does without", file=sys.stderr)
        return 4
    if args.dry_run:
        print("On a GPU:", *plan(setting), "Here, at toy size:", sep="\n", flush=True)
    chosen = [BY_NAME[name] for name in args.only]
    try:
        for stage in chosen:
            in_processes(stage, setting, args.again)
    finally:
        page = write_page(setting.out, STAGES, setting.dry) if setting.out.exists() else None
    for text in (f"not exercised: {text}" for stage in chosen if setting.dry for text in stage.unexercised):
        print(text)
    wrong = verdict(chosen, setting.out)
    print(*(f"missed: {text}" for text in wrong), f"the page: {page}", sep="\n")
    return int(bool(wrong))
