"""Accuracy kept at equal cost: real weights, real labels, every row at every FLOPs ratio, three calibration seeds.

    python tools/bench/accuracy.py --prepare                     fetch weights, train the image models
    python tools/bench/accuracy.py --quick                       real models alone, the default at 0.75 and 0.5, on
                                                                 128 samples
    python tools/bench/accuracy.py --out accuracy.json           measure what that file does not hold yet
           [--tasks minilm-stsb,vit-digits] [--rows ptf,default] [--ratios 0.75,0.5] [--seeds 0]
    python tools/bench/accuracy.py --out accuracy.json --check   hold the file against the targets, measure nothing

Tasks   real models that somebody else trained (``real.py``): mpnet on STS-B, EfficientNet-Lite0 on photographs, DINOv2
        with a probe on CIFAR-10, Gemma 270M on WikiText-2, Whisper on spoken digits; then (``tasks.py``) MiniLM on
        STS-B, a ViT and a CNN trained here on CIFAR-10 and on digits. Data under ``--data``; calibration from train
        splits, figures on dev or test splits, each with its sampling error
Rows    ``rows.py``; rows whose parts this fxprune lacks are reported as missing. Which rows saw labels is in
        each record
Budget  share of the multiply-accumulates of one sample (32 tokens): linear layers, convolutions, attention products
Peer    Torch-Pruning at the same count (``tools/peers``): five documented settings; per ratio the best of them *on the
        evaluation split* at the first seed counts, which favours the peer
Seeds   choose calibration samples and whatever else is random; mean, lowest and highest are reported. Rows that depend
        on neither are measured once

Results are written after every measurement, so a run may be interrupted; ``--again ROW,..`` measures rows anew. The
plot (``plot.py``) is drawn beside the results where matplotlib is there. Exit code 1 when a target is missed
(``--check``), or when data or weights are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.models import CACHE, DATA, LOADERS, RECIPES, train_cached
from bench.accuracy.plot import plot
from bench.accuracy.real import WEIGHTS, fetch
from bench.accuracy.rows import BEST, ROWS, missing
from bench.accuracy.run import Bench, Record, summary
from bench.accuracy.targets import check, find_unmeasured
from bench.accuracy.tasks import REAL, TASKS, Missing, Task, of_program, open_task
from bench.lists import names, numbers
from bench.record import peak_memory, read, write
from fxprune.ir.cost import CostModel

RATIOS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2)
SEEDS = (0, 1, 2)
SCORED = 512  # samples that scoring sees at most
QUICK = 128  # samples that the quick form uses at most


def read_held(path: Path) -> dict[str, Any]:
    """The results file, or an empty one."""
    empty: dict[str, Any] = {"tasks": {}, "measured": []}
    return {**empty, **read(path)} if path.exists() else empty


class Results:
    """What has been measured so far, on disk after every measurement."""

    def __init__(self, path: Path) -> None:
        held = read_held(path)
        self.path, self.tasks, self.measured = path, dict(held["tasks"]), list(held["measured"])
        self.missing: dict[str, str] = {}

    def drop(self, rows: Sequence[str], tasks: Sequence[str]) -> None:
        """Forget rows, to measure them anew."""
        self.measured = [r for r in self.measured if r["row"] not in rows or r["task"] not in tasks]

    def open(self, task: Task) -> None:
        """Dense figures of a task. Measurements of other weights under its name are forgotten."""
        about = {"metric": task.metric, "labelled": task.labelled, **task.about}
        known = self.tasks.get(task.name, {})
        if known.get("weights") != about["weights"] or "dense" not in known:
            self.measured = [r for r in self.measured if r["task"] != task.name]
            known = {"dense": round(task.accuracy(of_program(task.program)), 3)}
        dense = known["dense"]
        told = {"dense": dense, "error": sampling_error(task.metric, dense, about.get("judged"))}
        self.tasks[task.name] = {**about, **told, "dense_macs": CostModel(task.program)().flops}

    def save(self, records: Sequence[Record], task: str) -> None:
        """``records`` replace those of ``task``."""
        self.measured = [r for r in self.measured if r["task"] != task] + list(records)
        write(self.path, "accuracy", **self.content())

    def content(self) -> dict[str, Any]:
        return {
            "ratios": sorted({r["ratio"] for r in self.measured}, reverse=True),
            "seeds": sorted({r["seed"] for r in self.measured}),
            "tasks": self.tasks,
            "rows": [row.record() for row in ROWS.values()],
            "missing": self.missing,
            "summary": summary(self.measured),
            "peak_bytes": peak_memory(),
            "measured": self.measured,
        }


def sampling_error(metric: str, figure: float, judged: int | None) -> float | None:
    """Standard error of a percentage over ``judged`` items, in points: of a share, or of a rank correlation.

    >>> sampling_error("top-1", 89.2, 250), sampling_error("minus perplexity", -84.7, 6144)
    (1.963, None)
    """
    if judged is None or not 0 <= figure <= 100:
        return None
    share = figure / 100
    spread = 1 - share**2 if metric == "Spearman" else (share * (1 - share)) ** 0.5
    return round(100 * spread / judged**0.5, 3)


def table(content: Mapping[str, Any]) -> str:
    """Per task, mean over seeds and in brackets highest minus lowest; one line per row."""
    lines = []
    for task, rows in content["summary"].items():
        about = content["tasks"][task]
        lines += [
            "",
            f"{task}: {about['metric']}, dense {about['dense']:.2f}"
            + (f" ± {about['error']:.2f}" if about.get("error") else "")
            + f", {about['dense_macs'] / 1e6:.1f} M MACs",
            f"{'':22}" + "".join(f"{r:>15g}" for r in content["ratios"]),
        ]
        for name in (n for n in ROWS if n in rows):
            cells = (rows[name].get(f"{r:g}") for r in content["ratios"])
            lines.append(
                f"{name:22}"
                + "".join(
                    f"{'-':>15}" if c is None else f"{c['mean']:8.2f} ({c['max'] - c['min']:4.2f})" for c in cells
                )
            )
    return "\n".join([*lines, *(f"missing: {name}: {why}" for name, why in content["missing"].items())])


def measure(results: Results, tasks: Sequence[str], args: argparse.Namespace) -> None:
    """Open each task, measure, save as it goes. Raises Missing."""
    rows = []
    for name in args.rows:
        why = missing(ROWS[name])
        if why:
            results.missing[name] = why
        else:
            rows.append(ROWS[name])
    for name in tasks:
        task = open_task(name, args.data, args.align, args.cache, _say)
        results.open(task)
        about = results.tasks[task.name]
        _say(f"{task.name}: dense {about['dense']:.2f}, {about['dense_macs'] / 1e6:.1f} M MACs")
        bench = Bench(
            task,
            args.samples or (min(task.samples, QUICK) if args.quick else task.samples),
            args.score_samples or min(task.samples, SCORED),
            args.align,
            lambda records, name=task.name: results.save(records, name),
            _say,
            [r for r in results.measured if r["task"] == task.name],
        )
        results.save(bench.records, task.name)
        bench.run(rows, args.ratios, args.seeds)


def _say(text: str) -> None:
    print(text, flush=True)


def report(results: Results, verdict: bool) -> int:
    """Table, plot and, with ``verdict``, the targets; the exit code."""
    content = results.content()
    print(table(content))
    if content["summary"]:
        try:
            print("plot: " + ", ".join(map(str, plot(content, results.path.with_suffix("")))))
        except ImportError:
            print("no plot: matplotlib is not installed")
    if not verdict:
        return 0
    met, missed = check(content["summary"], {name: task["dense"] for name, task in results.tasks.items()})
    for text in met:
        print(f"met:    {text}")
    for text in (*missed, *(f"not measured: {text}" for text in find_unmeasured(content["summary"]))):
        print(f"missed: {text}")
    return int(bool(missed or find_unmeasured(content["summary"])))


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("build/accuracy.json"))
    made.add_argument("--data", type=Path, default=DATA, help="folder with stsb/ and cifar10/")
    made.add_argument("--cache", type=Path, default=CACHE, help="folder of the checkpoints")
    made.add_argument("--prepare", action="store_true", help="train what has no checkpoint and stop")
    made.add_argument("--check", action="store_true", help="hold --out against the targets and stop")
    made.add_argument(
        "--quick", action="store_true", help="real models, the default at 0.75 and 0.5, 128 samples, one seed"
    )
    made.add_argument("--tasks", type=names(TASKS), default=list(TASKS))
    made.add_argument("--rows", type=names(ROWS), default=list(ROWS))
    made.add_argument("--again", type=names(ROWS), default=[], help="rows to measure anew")
    made.add_argument("--ratios", type=numbers(float), default=list(RATIOS))
    made.add_argument("--seeds", type=numbers(int), default=list(SEEDS))
    made.add_argument("--samples", type=int, help="samples that recovery sees (the task's choice by default)")
    made.add_argument("--score-samples", type=int, help="samples that scoring sees (likewise)")
    made.add_argument("--align", type=int, default=8)
    made.add_argument("--threads", type=int, default=1)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, check, or measure and report."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.quick:
        chosen = [name for name in args.tasks if name in REAL]
        args.tasks, args.rows, args.ratios, args.seeds = chosen, [BEST], [0.75, 0.5], [0]
    if args.check:
        return report(Results(args.out), verdict=True)
    try:
        if args.prepare:
            for name in (n for n in args.tasks if n in WEIGHTS):
                fetch(name, _say)
            for recipe in (RECIPES[name] for name in args.tasks if name in RECIPES):
                _, about = train_cached(recipe, LOADERS[recipe.data](args.data), args.cache, _say)
                _say(
                    f"{recipe.path(args.cache)}: test accuracy {100 * about['test_accuracy']:.2f}, "
                    f"{about['cpu_seconds']} CPU s"
                )
            return 0
        results = Results(args.out)
        results.drop(args.again, args.tasks)
        measure(results, args.tasks, args)
    except (Missing, FileNotFoundError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return report(results, verdict=False)
