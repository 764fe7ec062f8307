"""How well recovery's guard chooses when there are few calibration samples, and what the choosing costs.

    python tools/bench/few.py [--tasks vit-digits,..] [--samples 32,64] [--ratios 0.6,0.45,0.3] [--seeds 0,1,2]
                              [--out build/few.json]

Plans     those of ``accuracy.py``'s ``optin-recover`` (trajectory importance, members by OBS), scored on the samples
Choices   guard   what ``--recover auto`` takes: three of five folds, two strengths of refit, copies within one standard
                  error
          folds   every candidate (bias, ridge, refit, and the last two at a strong ridge) judged on all five folds,
                  copies within 0.002 (what the guard did before)
          refit, none   without looking
Judged    each choice, fitted to all samples, on 512 train samples that no method saw: KL divergence from the dense
          outputs, or one minus the agreement of similarities where outputs are embeddings. *Regret*: by how much that
          is larger than the best candidate's, geometric mean. *Worse*: plans where it is larger than without recovery
Cells where the samples allow a single split are left out: there the guard judges that split alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.models import CACHE, DATA
from bench.accuracy.rows import ROWS
from bench.accuracy.run import Bench
from bench.accuracy.tasks import TASKS, Missing, Task, open_task
from bench.lists import names, numbers
from bench.record import read, write
from fxprune.passes.transform.recovery.agreement import Agreement, Yardstick, pool
from fxprune.passes.transform.recovery.choose import TOLERANCE, Guard, split_in_folds, yardsticks
from fxprune.passes.transform.recovery.closed_form import ClosedForm
from fxprune.passes.transform.resize import resize
from fxprune.process.silence import quiet
from fxprune.testing import keep_of

POOL, OTHERS, HELD_OUT = 512, 99, 0.2
Record = dict[str, Any]


def measure(task: Task, bench: Bench, samples: int, ratio: float, seed: int) -> Record | None:
    """One plan: how far every candidate is from dense on other samples, and which each way of choosing takes."""
    planned = bench.plan(ROWS["optin-recover"], ratio, seed)
    program, data = planned.program, planned.data
    folds = split_in_folds(program, data, HELD_OUT)
    if len(folds) < 2:
        return None
    keep = keep_of(program, program.need("plan"))
    pruned = program.without_facts(exported=resize(program, keep))
    guard = Guard(ClosedForm("auto"), HELD_OUT, seed)
    started = time.process_time()
    verdict = guard.judge(program, pruned, keep, data)
    seconds = {"guard": time.process_time() - started}
    forms = guard._candidates(sum(b.size for b in folds[0][0]), several=False)
    started = time.process_time()
    rulers = yardsticks(program, folds, seed, data.samples)
    told = {"none": pool([r.compare(pruned) for r in rulers])}
    for name, form in forms.items():
        told[name] = pool(
            [
                ruler.compare(pruned, form.fit(program, pruned, keep, rest).tensors)
                for ruler, (rest, _) in zip(rulers, folds, strict=True)
            ]
        )
    seconds["folds"] = time.process_time() - started
    ruler = Yardstick(program, task.calibration(POOL, OTHERS).batches, 7)
    far = {"none": _far(ruler.measure(pruned))}
    for name, form in forms.items():
        far[name] = _far(ruler.measure(pruned, form.fit(program, pruned, keep, data.batches).tensors))
    return {
        "task": task.name,
        "samples": samples,
        "ratio": ratio,
        "seed": seed,
        "far": far,
        "chosen": {"guard": verdict.chosen, "folds": _best(told), "refit": "refit", "none": "none"},
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
    }


def _far(found: Agreement) -> float:
    return 1 - found.mixed if found.kl is None else found.kl


def _best(told: Mapping[str, Agreement]) -> str:
    """The guard's rule with its fixed tolerance."""
    fine = {name: v.mixed for name, v in told.items() if not v.veto(told["none"], TOLERANCE)}
    return max(fine, key=lambda name: fine[name])


def summary(records: Sequence[Record]) -> list[Record]:
    """Per way of choosing: regret, plans it made worse, seconds in all; over every record, and per task and samples."""
    found = []
    cells = sorted({(r["task"], r["samples"]) for r in records})
    for cell in [None, *cells]:
        here = [r for r in records if cell is None or (r["task"], r["samples"]) == cell]
        for how in ("guard", "folds", "refit", "none"):
            logs = [math.log(r["far"][r["chosen"][how]] / min(r["far"].values())) for r in here]
            found.append(
                {
                    "task": cell[0] if cell else "all",
                    "samples": cell[1] if cell else None,
                    "how": how,
                    "plans": len(here),
                    "regret": round(math.exp(sum(logs) / len(logs)) - 1, 4),
                    "worse": sum(r["far"][r["chosen"][how]] > r["far"]["none"] for r in here),
                    "seconds": round(sum(r["seconds"].get(how, 0.0) for r in here), 1),
                }
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tasks", type=names(TASKS), default=list(TASKS))
    made.add_argument("--samples", type=numbers(int), default=[32, 64])
    made.add_argument("--ratios", type=numbers(float), default=[0.6, 0.45, 0.3])
    made.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    made.add_argument("--data", type=Path, default=DATA)
    made.add_argument("--cache", type=Path, default=CACHE)
    made.add_argument("--out", type=Path, default=Path("build/few.json"))
    args = made.parse_args(argv)
    torch.set_num_threads(1)
    records: list[Record] = read(args.out)["measured"] if args.out.exists() else []
    for name in args.tasks:
        try:
            task = open_task(name, args.data, cache=args.cache)
        except Missing as problem:
            print(problem, file=sys.stderr)
            return 1
        for samples in args.samples:
            for seed in args.seeds:
                bench = Bench(task, samples, samples, 8, lambda _: None)
                for ratio in args.ratios:
                    key = {"task": name, "samples": samples, "ratio": ratio, "seed": seed}
                    if any(all(r[k] == v for k, v in key.items()) for r in records):
                        continue
                    with quiet():
                        one = measure(task, bench, samples, ratio, seed)
                    if one is None:
                        continue
                    records.append(one)
                    print(json.dumps({**key, "chosen": one["chosen"], "seconds": one["seconds"]}), flush=True)
                    write(args.out, "few", summary=summary(records), measured=records)
    for line in summary(records):
        print(json.dumps(line))
    return 0
