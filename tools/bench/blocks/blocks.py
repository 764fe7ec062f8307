"""Accuracy against the share of MACs that tiles keep: tile sizes, criteria, allocations, with and without recovery.

    python tools/bench/blocks.py --out blocks.json [--tasks vit-digits] [--tiles 16x16,32x32] [--rows lsp,magnitude]
           [--ratios 0.75,0.5] [--seeds 0]
    python tools/bench/blocks.py --out blocks.json --draw        the pictures alone

Tasks   those of ``accuracy.py`` (real weights, real labels; calibration without labels, from the train split)
Rows    lsp            LSP scores and Fisher curves, allocated by the KKT condition (fxprune's default)
        lsp-paper      the same, allocated by LSP's rule: lambda and the power term
        lsp-no-power   the same without the power term
        uniform        LSP scores, the same share of every layer
        magnitude, wanda, obert   other criteria (magnitude and wanda: the same share of every layer)
        Each with recovery (``RecoverBlocks{method=auto}``) as well: ``lsp+recover``.
Budget  share of all multiply-accumulates, attention products and layers that stay dense included. They are *effective*
        ones: what runs is decided by the target's measured table. The share of linear layers is in each record
Not the paper's setting: it fine-tunes for 300 epochs afterwards, nothing is trained here

Results are written after every cell, so a run may be interrupted. Pictures (``plot.py``) are drawn beside the
results where matplotlib is there: accuracy, kept share per layer, and the tiles of every layer of one plan per task.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.models import CACHE, DATA
from bench.accuracy.tasks import TASKS, Missing, Task, of_program, open_task
from bench.blocks.plot import BARS, SHOWN, plot
from bench.record import read, write
from fxprune.data import Calibration
from fxprune.errors import BudgetInfeasible
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_blocks import FindBlocks
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_blocks import SearchBlocks
from fxprune.passes.transform.recover_blocks import RecoverBlocks
from fxprune.passes.transform.sparsify_blocks import SparsifyBlocks

TILES = ("16x16", "16x32", "32x16", "32x32", "64x64")
RATIOS = (0.75, 0.6, 0.5, 0.4, 0.3)
START = ("axes", "groups", "plan")
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # row -> criterion, options of the search
    "lsp": ("lsp", {"allocation": "kkt"}),
    "lsp-paper": ("lsp", {"allocation": "lsp"}),
    "lsp-no-power": ("lsp", {"allocation": "lsp", "power": False}),
    "uniform": ("lsp", {"allocation": "uniform"}),
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "obert": ("obert", {}),
}


def score(program: Program, tile: str, criterion: str, data: Calibration, seed: int) -> Program:
    """The program with tiles as its groups, and their scores."""
    passes = (PropagateAxes(), FindBlocks(tile), ScoreGroups(criterion, data=data, seed=seed))
    return Pipeline(passes).run(program.without_facts())


def cell(
    task: Task, program: Program, options: Mapping[str, Any], ratio: float, recover: bool, data: Calibration, seed: int
) -> tuple[dict[str, Any], Program]:
    """The figure of one plan, and the program with the plan."""
    started = time.perf_counter()
    search = SearchBlocks(Budget("flops", ratio), **options)
    found = Pipeline((search,), start=("axes", "groups", "scores")).run(program)
    one = RecoverBlocks("auto" if recover else "none", data=data, seed=seed)
    small, (fitted, _) = Pipeline((one, SparsifyBlocks()), start=START).apply(found)
    plan = found.need("plan")
    kept = {
        g.matrix.parameter: plan.blocks[g.matrix.parameter].density if g.matrix.parameter in plan.blocks else 1.0
        for g in found.need("groups")
        if g.prunable
    }
    macs = {g.matrix.parameter: g.matrix.macs for g in found.need("groups") if g.prunable}
    linear = sum(macs[n] * kept[n] for n in kept) / sum(macs.values())
    return {
        "figure": round(task.accuracy(of_program(small)), 3),
        "effective": plan.about["predicted"]["flops"],
        "linear_share": round(linear, 4),
        "power_estimate": round(plan.about["power"]["share"], 4),
        "recovery": "none" if fitted.record is None else fitted.record.chosen,
        "kept": {n: round(k, 3) for n, k in kept.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }, found


def measure(args: argparse.Namespace, held: dict[str, Any], name: str) -> None:
    """All cells of a task that are not there yet."""
    task = open_task(name, args.data, cache=args.cache)
    if name not in held["tasks"]:
        held["tasks"][name] = {
            "metric": task.metric,
            **task.about,
            "dense_macs": CostModel(task.program)().flops,
            "dense": round(task.accuracy(of_program(task.program)), 3),
        }
    done = {(r["task"], r["tile"], r["row"], r["ratio"], r["seed"]) for r in held["measured"]}
    for seed in args.seeds:
        data = task.calibration(args.samples or task.samples, seed)
        for tile in args.tiles:
            programs: dict[str, Program] = {}
            for row, ratio, recover in ((r, x, c) for r in args.rows for x in args.ratios for c in (False, True)):
                label = row + "+recover" * recover
                if (name, tile, label, ratio, seed) in done:
                    continue
                criterion, options = ROWS[row]
                if criterion not in programs:
                    programs[criterion] = score(task.program, tile, criterion, data, seed)
                record = {
                    "task": name,
                    "tile": tile,
                    "row": label,
                    "ratio": ratio,
                    "seed": seed,
                    "samples": data.samples,
                }
                try:
                    found, program = cell(task, programs[criterion], options, ratio, recover, data, seed)
                except BudgetInfeasible as error:
                    held["measured"].append({**record, "infeasible": error.why})
                    continue
                if (tile, ratio) != SHOWN or label not in BARS:
                    found.pop("kept")  # share per layer: as long as all the rest, and drawn of those alone
                held["measured"].append({**record, **found})
                if (tile, ratio, row) == (*SHOWN, "lsp") and not recover:
                    held["masks"][name] = {n: b.kept.int().tolist() for n, b in program.need("plan").blocks.items()}
                print(f"{name} {tile} {label} at {ratio:g}: {found['figure']:.2f}", flush=True)
                write(args.out, "blocks", **held)


def main() -> int:
    """Measure and draw. Exit code 1 when data or weights are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return [w for w in text.split(",") if w]

    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=words, default=["vit-digits", "minilm-stsb"], help=f"of {', '.join(TASKS)}")
    parser.add_argument("--tiles", type=words, default=list(TILES))
    parser.add_argument("--rows", type=words, default=list(ROWS))
    parser.add_argument("--ratios", type=lambda t: [float(x) for x in words(t)], default=list(RATIOS))
    parser.add_argument("--seeds", type=lambda t: [int(x) for x in words(t)], default=[0])
    parser.add_argument("--samples", type=int, default=0, help="calibration samples (default: the task's)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained image models are kept")
    parser.add_argument("--draw", action="store_true", help="draw what --out holds and stop")
    args = parser.parse_args()
    held: dict[str, Any] = {"tasks": {}, "measured": [], "masks": {}}
    if args.out.exists():
        held |= {k: v for k, v in read(args.out).items() if k in held}
    code = 0
    for name in [] if args.draw else args.tasks:
        try:
            measure(args, held, name)
        except Missing as missing:
            print(f"{name}: {missing}", file=sys.stderr)
            code = 1
    try:
        for path in plot(held, args.out.with_suffix("")):
            print(path)
    except ImportError:
        print("no picture: matplotlib is not installed")
    return code
