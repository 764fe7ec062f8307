"""How long compiling takes and how much memory it needs: ViT-B by stages, analysis against depth, the import.

    python tools/bench/compile.py [--out compile.json] [--threads 2] [--model vit_base_patch16_224]

stages   capture, analysis, magnitude plan and slice of one timm model in a fresh process, twice: with these passes
         alone, and with everything that ``fxprune.compile`` does (it also compares slicing with masking). Memory is the
         peak of the process, and that peak minus what the process held once everything was imported, each over the
         bytes of the model's parameters and buffers. Target: under 60 s and under 4 times.
depth    CPU seconds of analysis for ViTs of 6, 12, 24 and 48 blocks. Target: linear in the number of nodes
import   ``import fxprune`` after ``import torch``, median of 5 fresh processes. Target: under 0.3 s

Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.record import MIB, command, memory, peak_memory, write

RATIO = 0.5
DEPTHS = (6, 12, 24, 48)
MOST_SECONDS, MOST_MEMORY, MOST_IMPORT, MOST_GROWTH = 60.0, 4.0, 0.3, 1.5
IMPORT = "import time, torch; t = time.perf_counter(); import fxprune; print(time.perf_counter() - t)"
Row = dict[str, Any]


def stages(model: str, threads: int, whole: bool) -> Row:
    """Seconds and memory of one compilation in this process; ``whole`` is ``fxprune.compile`` itself."""
    import torch

    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    import timm

    import fxprune

    torch.set_num_threads(threads)
    imported, started = memory(), time.perf_counter()
    module: Any = timm.create_model(model).eval()
    size = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    inputs = (torch.randn(2, *module.pretrained_cfg["input_size"]),)
    built = memory()
    seconds, cpu = {"build": time.perf_counter() - started}, time.process_time()

    def time_step(name: str, step: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = step()
        seconds[name] = time.perf_counter() - begun
        return result

    if whole:
        time_step("fxprune.compile", lambda: fxprune.compile(module, inputs, flops=RATIO, importance="l2"))
    else:
        by_passes(module, inputs, time_step)
    cpu, peak = time.process_time() - cpu, peak_memory()
    return {
        "what": "fxprune.compile" if whole else "passes",
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "total_s": round(sum(v for k, v in seconds.items() if k != "build"), 2),
        "cpu_s": round(cpu, 2),
        "model_mb": round(size / MIB, 1),
        "imported_mb": round(imported / MIB, 1),
        "built_mb": round(built / MIB, 1),
        "peak_mb": round(peak / MIB, 1),
        "peak_over_model": round(peak / size, 2),
        "peak_minus_imported_over_model": round((peak - imported) / size, 2),
    }


def by_passes(module: Any, inputs: tuple[Any, ...], time_step: Callable[[str, Callable[[], Any]], Any]) -> None:
    """The stages one by one, in the order in which ``fxprune.compile`` runs them."""
    from fxprune.intake.capture import capture
    from fxprune.ir.cost import Budget
    from fxprune.ir.pipeline import Pipeline
    from fxprune.passes.analysis.score_groups import ScoreGroups
    from fxprune.passes.search.search_plan import SearchPlan
    from fxprune.passes.transform.fold_indices import FoldIndices
    from fxprune.passes.transform.slice_axes import SliceAxes

    program = time_step("capture", lambda: capture(module, inputs))
    program = time_step("analysis", lambda: analyse(program))
    plan = Pipeline((ScoreGroups(criterion="l2"), SearchPlan(Budget("flops", RATIO))), start=("axes", "groups"))
    program = time_step("plan", lambda: plan.run(program))
    time_step("slice", lambda: Pipeline((SliceAxes(), FoldIndices()), start=("axes", "groups", "plan")).run(program))


def analyse(program: Any) -> Any:
    """Everything between capture and scores."""
    from fxprune.ir.pipeline import Pipeline
    from fxprune.passes.analysis.find_groups import FindGroups
    from fxprune.passes.analysis.propagate_axes import PropagateAxes
    from fxprune.passes.transform.clean import Clean
    from fxprune.passes.transform.fold_weights import FoldWeights
    from fxprune.passes.transform.inline import Inline
    from fxprune.passes.transform.unshare import Unshare

    steps = (Clean(), Inline(), FoldWeights(), PropagateAxes(), FindGroups(), Unshare())
    program = Pipeline(steps).run(program)
    return program if program.groups is not None else Pipeline((PropagateAxes(), FindGroups())).run(program)


def depth(blocks: int, repeats: int = 7) -> Row:
    """The quickest of some analyses of a narrow ViT, in CPU seconds: other work on the machine counts less."""
    import torch

    from fxprune.intake.capture import capture
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    import timm

    torch.set_num_threads(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=blocks, num_heads=3)
    begun = time.perf_counter()
    program = capture(model, (torch.randn(2, 3, 32, 32),))
    captured, nodes = time.perf_counter() - begun, len(program.graph.nodes)
    analyse(program)  # the first time imports
    samples = []
    for _ in range(repeats):
        begun = time.process_time()
        analyse(program)
        samples.append(time.process_time() - begun)
    return {
        "blocks": blocks,
        "nodes": nodes,
        "capture_s": round(captured, 3),
        "analysis_cpu_s": round(min(samples), 4),
        "analysis_ms_per_node": round(1e3 * min(samples) / nodes, 4),
    }


def growth(rows: Sequence[Row]) -> Row:
    """Least squares of seconds on nodes; time per node of the deepest over the shallowest is 1 when linear."""
    nodes, seconds = [r["nodes"] for r in rows], [r["analysis_cpu_s"] for r in rows]
    fit = statistics.linear_regression(nodes, seconds)
    return {
        "slope_ms_per_node": round(1e3 * fit.slope, 4),
        "intercept_s": round(fit.intercept, 4),
        "r2": round(statistics.correlation(nodes, seconds) ** 2, 5),
        "per_node_deepest_over_shallowest": round((seconds[-1] / nodes[-1]) / (seconds[0] / nodes[0]), 3),
    }


def imports(times: int = 5) -> Row:
    """Seconds of ``import fxprune`` in fresh processes."""
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(times)
    ]
    samples = [round(float(run.stdout), 3) for run in runs]
    return {"median_s": statistics.median(samples), "samples_s": samples}


def apart(*arguments: str) -> Row:
    """One measurement in a fresh process. Raises with what it wrote when it fails."""
    done = subprocess.run([*command("compile"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def misses(compiled: Sequence[Row], depths: Row, imported: Row) -> list[str]:
    """Targets that are not met."""
    found = []
    for row in compiled:
        if row["total_s"] > MOST_SECONDS:
            found.append(f"{row['what']} takes {row['total_s']} s, target {MOST_SECONDS:g}")
        if row["peak_over_model"] > MOST_MEMORY:
            found.append(f"{row['what']} peaks at {row['peak_over_model']} times the model, target {MOST_MEMORY:g}")
    if depths["per_node_deepest_over_shallowest"] > MOST_GROWTH:
        found.append(f"analysis per node grows {depths['per_node_deepest_over_shallowest']} times with depth")
    if imported["median_s"] > MOST_IMPORT:
        found.append(f"import takes {imported['median_s']} s, target {MOST_IMPORT:g}")
    return found


def show(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    result = Table(title=title)
    for column in rows[0]:
        result.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        result.add_row(
            *(
                ", ".join(f"{k} {v}" for k, v in cell.items()) if isinstance(cell, dict) else str(cell)
                for cell in row.values()
            )
        )
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model")
    parser.add_argument("--one", choices=["passes", "compile", "depth"], help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=12, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        row = (
            depth(options.blocks)
            if options.one == "depth"
            else stages(options.model, options.threads, options.one == "compile")
        )
        print(json.dumps(row))
        return 0
    same = ["--model", options.model, "--threads", str(options.threads)]
    compiled = [apart("--one", one, *same) for one in ("passes", "compile")]
    show(f"{options.model} at {RATIO} of the MACs, {options.threads} threads", compiled)
    depths = [apart("--one", "depth", "--blocks", str(blocks)) for blocks in DEPTHS]
    show("analysis against depth", depths)
    fit, imported = growth(depths), imports()
    show("least squares of analysis seconds on nodes", [fit])
    show("import fxprune after import torch", [imported])
    missed = misses(compiled, fit, imported)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    if options.out:
        write(
            options.out,
            "compile",
            model=options.model,
            threads=options.threads,
            compile=compiled,
            depth=depths,
            growth=fit,
            imports=imported,
            missed=missed,
        )
    return int(bool(missed))
