"""Peak memory of the whole command on a large language model with random weights.

    python tools/bench/memory.py [--flops 0.75] [--target eager] [--layers 22] [--samples 0] [--memory 2GiB]
                                 [--threads 2] [--out memory.json]

Model   as large as TinyLlama: 22 layers, 2048 wide, 32 heads in 4 groups, 5632 neurons, 32000 words: 1.1 billion
        parameters, 4.1 GiB in fp32, written to a temporary folder as transformers would
Run     ``fxprune compile FOLDER --flops 0.75`` in a fresh process; with --samples N also random sentences of 64 words
        as calibration data, scored by trajectory and recovered, caches within --memory
Figures peak resident memory of the process, and as a multiple of the model's bytes; seconds, and those of every pass
Targets at most 20 GiB, and at most three times the model plus, with calibration data, --memory. Exit code 1 when one is
        missed
A run replaces what --out holds of the same layers, target and samples.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import commit, write

MOST, TIMES = 20 * 2**30, 3.0
KEY = ("layers", "target", "samples")
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
         "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False}
MAKE = """
import json, sys, torch
from fxprune.surroundings import survive_torchvision
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
    from fxprune.memory import share, within

    with within(args.memory):
        budget = share(2**62, 1.0)
    with tempfile.TemporaryDirectory(dir=args.folder) as held:
        folder = Path(held)
        sizes = json.dumps({**SIZES, "num_hidden_layers": args.layers})
        made = subprocess.run([sys.executable, "-c", MAKE, str(folder / "model"), sizes], check=True,
                              stdout=subprocess.PIPE, text=True)
        parameters = int(made.stdout.split()[-1])
        calibrated = data(folder / "data.npz", args.samples) if args.samples else []
        argv = [sys.executable, "-m", "fxprune", "compile", str(folder / "model"), "--flops", str(args.flops),
                "--target", args.target, "--out", str(folder / "small"), "--memory", args.memory,
                "--threads", str(args.threads), "--json", *calibrated]
        started = time.perf_counter()
        done = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert done.stdout is not None
        said = done.stdout.read()
        _, status, used = _waited(done)
        seconds = time.perf_counter() - started
    if status:
        print(f"the command failed with {status}", file=sys.stderr)
        return 1
    report = json.loads(said)["report"]
    peak, weights = used.ru_maxrss * 1024, 4 * parameters
    passes: dict[str, float] = {}
    for one in report["passes"]:
        passes[one["name"]] = round(passes.get(one["name"], 0.0) + one["seconds"], 1)
    record: dict[str, Any] = {
        "layers": args.layers, "commit": commit(), "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "parameters": parameters, "weights_bytes": weights, "flops": args.flops, "target": args.target,
        "samples": args.samples, "memory": args.memory, "threads": args.threads, "seconds": round(seconds, 1),
        "peak_bytes": peak, "times_the_model": round(peak / weights, 3),
        "times_without_caches": round((peak - (budget if args.samples else 0)) / weights, 3),
        "ratio": report["cost"]["ratio"]["flops"], "parity": report["parity"]["ok"], "passes": passes}
    earlier = json.loads(args.out.read_text(encoding="utf-8"))["measured"] if args.out.exists() else []
    others = [r for r in earlier if any(r[k] != record[k] for k in KEY)]
    write(args.out, "memory", measured=[*others, record])
    print(json.dumps(record, indent=1))
    missed = [text for bad, text in (
        (peak > MOST, f"{peak / 2**30:.1f} GiB are more than {MOST / 2**30:.0f}"),
        (record["times_without_caches"] > TIMES, f"{record['times_without_caches']} times the model, {TIMES:g} wanted"),
    ) if bad]
    print(*(f"missed: {m}" for m in missed), sep="\n")
    return int(bool(missed))


def _waited(process: subprocess.Popen[str]) -> tuple[int, int, resource.struct_rusage]:
    import os

    pid, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return pid, process.returncode, used


if __name__ == "__main__":
    sys.exit(main())
