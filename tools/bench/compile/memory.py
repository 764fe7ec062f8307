"""Peak memory of the whole command on a large language model with random weights.

    python tools/bench/memory.py [--flops 0.75] [--target eager] [--layers 22] [--samples 0] [--memory 2GiB]
                                 [--threads 2] [--out memory.json]

Model   as large as TinyLlama: 22 layers, 2048 wide, 32 heads in 4 groups, 5632 neurons, 32000 words: 1.1 billion
        parameters, 4.1 GiB in fp32, written to a temporary folder as transformers would
Run     ``fxprune compile FOLDER --flops 0.75`` in a fresh process; with --samples N also random sentences of 64 words
        as calibration data, scored by trajectory and recovered, caches within --memory
Figures peak resident memory of the process, and as a multiple of the model's bytes; the same beside what the command
        takes for a model of no size (PyTorch, transformers, the runtime); whether the result was timed beside the dense
        model; seconds, and those of every pass
Targets at most 20 GiB, and at most three times the model beside those libraries and, with calibration data, --memory.
        Exit code 1 when one is missed
A run replaces what --out holds of the same layers, target and samples.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.record import commit, read, write

MOST, TIMES = 20 * 2**30, 3.0
KEY = ("layers", "target", "samples")
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
NOTHING = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
MAKE = """
import json, sys, torch
from fxprune.process.libraries import survive_torchvision
survive_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2])))
model.save_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()))
"""


def data(path: Path, samples: int) -> list[str]:
    """Options for random sentences."""
    import numpy as np

    ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (samples, 64))
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids))
    return ["--data", str(path), "--samples", str(samples)]


def main() -> int:
    """Make, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=0.75)
    parser.add_argument("--target", default="eager")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files lie while it runs (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("build/memory.json"))
    args = parser.parse_args()
    from fxprune.data.memory import memory_limit, share

    with memory_limit(args.memory):
        budget = share(2**62, 1.0)
    with tempfile.TemporaryDirectory(dir=args.folder) as held:
        folder = Path(held)
        make_model(folder / "nothing", NOTHING)
        parameters = make_model(folder / "model", {**SIZES, "num_hidden_layers": args.layers})
        calibrated = data(folder / "data.npz", args.samples) if args.samples else []
        options = [
            "--flops",
            str(args.flops),
            "--target",
            args.target,
            "--memory",
            args.memory,
            "--threads",
            str(args.threads),
            "--json",
        ]
        try:
            libraries, _, _ = measure([str(folder / "nothing"), *options, "--out", str(folder / "none")])
            options += [*calibrated, "--out", str(folder / "small")]
            peak, seconds, said = measure([str(folder / "model"), *options])
        except subprocess.CalledProcessError as failed:
            print(f"the command failed with {failed.returncode}", file=sys.stderr)
            return 1
    report, weights = json.loads(said)["report"], 4 * parameters
    caches = budget if args.samples else 0
    passes: dict[str, float] = {}
    for one in report["passes"]:
        passes[one["name"]] = round(passes.get(one["name"], 0.0) + one["seconds"], 1)
    record: dict[str, Any] = {
        "layers": args.layers,
        "commit": commit(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "parameters": parameters,
        "weights_bytes": weights,
        "flops": args.flops,
        "target": args.target,
        "samples": args.samples,
        "memory": args.memory,
        "threads": args.threads,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "libraries_bytes": libraries,
        "times_the_model": round(peak / weights, 3),
        "times_without_caches": round((peak - caches) / weights, 3),
        "times_beside_libraries": round((peak - caches - libraries) / weights, 3),
        "timed": bool(report["measured"]["rows"]),
        "ratio": report["cost"]["ratio"]["flops"],
        "parity": report["parity"]["ok"],
        "passes": passes,
    }
    earlier = read(args.out)["measured"] if args.out.exists() else []
    others = [r for r in earlier if any(r[k] != record[k] for k in KEY)]
    write(args.out, "memory", measured=[*others, record])
    print(json.dumps(record, indent=1))
    missed = [
        text
        for bad, text in (
            (peak > MOST, f"{peak / 2**30:.1f} GiB are more than {MOST / 2**30:.0f}"),
            (
                record["times_beside_libraries"] > TIMES,
                f"{record['times_beside_libraries']} times the model beside libraries, {TIMES:g} wanted",
            ),
        )
        if bad
    ]
    print(*(f"missed: {m}" for m in missed), sep="\n")
    return int(bool(missed))


def make_model(path: Path, sizes: Mapping[str, Any]) -> int:
    """A model of these sizes in a folder; how many parameters it has."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE, str(path), json.dumps(sizes)], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-1])


def measure(arguments: Sequence[str]) -> tuple[int, float, str]:
    """(peak resident bytes, seconds, what it printed) of ``fxprune compile``. Raises CalledProcessError."""
    argv = [sys.executable, "-m", "fxprune", "compile", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return used.ru_maxrss * 1024, time.perf_counter() - started, said
