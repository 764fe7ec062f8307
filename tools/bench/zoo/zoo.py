"""Every model fxprune must work on, at its real size with random weights: is it right, how far does it go, how long.

    python tools/bench/zoo.py [--only 'swin*'] [--ratios 0.75,0.5,0.25] [--no-onnx] [--out zoo.json [--update]]

Each model runs in a process of its own, so that a crash or a memory peak does not end the run. For every FLOPs ratio
(L2 scores, kinds, alignment and floors as the tool chooses them) the row says what was measured:

    reached     predicted MACs over dense MACs; must be at most the ratio and within 2 % or one chunk of it.
                "from 0.31": the ratio is out of reach, and that is where the reachable range begins
    error       sliced against masked outputs at the example's batch, relative to the largest output (at most 1e-4)
    other       the same at another batch size, and another length for texts
    effect      masked against dense outputs: were it small, an error could hide
    counted     MACs that torch.utils.flop_counter counts in the sliced graph, over the predicted ones
    saved       a .pt2 written and read back gives the same bits
    onnx        ONNX Runtime against the sliced graph at several sizes, relative (ratio 0.5 only)

Exit code 1 when anything failed; the row says what. ``--one NAME`` runs one model in this process, with tracebacks.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.record import MIB, command, commit, describe_error, peak_memory, read, write
from bench.zoo.models import MODELS, TEXT, Built, build, other_inputs
from fxprune.backends.onnx.backend import OnnxBackend
from fxprune.errors import BudgetInfeasible
from fxprune.extend import write_program
from fxprune.intake.archive import read_program
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.fold_indices import FoldIndices
from fxprune.passes.transform.fold_weights import FoldWeights
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.passes.transform.unshare import Unshare
from fxprune.process.silence import quiet
from fxprune.target.backend import lower_and_verify
from fxprune.testing import masked_run, relative_error, run_flat

TOLERANCE = 1e-4  # relative, fp32
ONNX_AT = 0.5
Row = dict[str, Any]
Flat = list[Any]


@dataclass
class Subject:
    """One model on its way: its analysed graph, inputs at two sizes, and what has failed so far."""

    program: Program
    example: Flat
    other: Flat | None  # None where the graph fixes the batch
    single: Flat  # batch 1, or the fixed batch
    dense: Flat
    failures: list[str] = field(default_factory=list)

    def check(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.failures.append(complaint)

    def attempt(self, what: str, row: Row, step: Callable[[], Row]) -> None:
        """Columns of one step; an exception is a failure of the row and the next step goes on."""
        try:
            with quiet():
                row |= step()
        except Exception as error:  # whatever it is, the table must tell it
            traceback.print_exc(file=sys.__stderr__)  # past quiet()
            self.failures.append(f"{what}: {describe_error(error)}")


# ---------------------------------------------------------------- from the module to groups


def analyse(name: str, built: Built) -> tuple[Subject, Row]:
    """Capture and analysis: nodes, seconds, groups by kind, frozen ones by kind and reason."""
    module, args, kwargs = built
    started = time.perf_counter()
    program = capture(module, args, kwargs, name=name)
    captured = time.perf_counter()
    raw = len(program.graph.nodes)
    steps = (Clean(), Inline(), FoldWeights(), PropagateAxes(), FindGroups(), Unshare())
    program = Pipeline(steps).run(program)
    if program.groups is None:  # a table was unshared
        program = Pipeline((PropagateAxes(), FindGroups())).run(program)
    analysed = time.perf_counter()
    groups = program.need("groups")
    live = collections.Counter(str(g.kind) for g in groups if g.prunable)
    frozen = collections.Counter(f"{g.kind}: {g.frozen.partition(' at ')[0]}" for g in groups if g.frozen)
    dense, example = CostModel(program)(), program.flatten(args, kwargs)
    batch_open = not any("batch size fixed" in note for note in program.notes)
    length = None if any("sequence length fixed" in note for note in program.notes) else TEXT[1] - 21
    single = program.flatten(*other_inputs(args, kwargs, 1)) if batch_open else example
    other = program.flatten(*other_inputs(args, kwargs, 3, length)) if batch_open else None
    subject = Subject(program, example, other, single, run_flat(program, example))
    subject.check(batch_open, f"another batch size: {'; '.join(program.notes)}")
    subject.check(not program.need("axes").unknown, f"ops without a rule: {dict(program.need('axes').unknown)}")
    return subject, {
        "params_m": round(dense.params / 1e6, 2),
        "gmacs": round(dense.flops / 1e9, 3),
        "nodes": raw,
        "nodes_clean": len(program.graph.nodes),
        "capture_s": round(captured - started, 2),
        "analysis_s": round(analysed - captured, 2),
        "open": open_sizes(program),
        "groups": dict(live),
        "frozen": dict(frozen),
        "notes": list(program.notes),
    }


def open_sizes(program: Program) -> str:
    """Shapes of the user inputs, open sizes as letters: ``[a, 3, 224, 224]``."""
    letters: dict[str, str] = {}
    shapes = []
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name in program.user_inputs and isinstance(value, Tensor):
            sizes = [
                letters.setdefault(str(s), chr(97 + len(letters))) if not str(s).isdigit() else str(s)
                for s in value.shape
            ]
            shapes.append(f"[{', '.join(sizes)}]")
    return " ".join(dict.fromkeys(shapes))


# ---------------------------------------------------------------- one ratio


def prune(subject: Subject, ratio: float, onnx: bool, threads: int) -> Row:
    """All columns of one ratio."""
    row: Row = {"ratio": ratio}
    program, budget, started = subject.program, Budget("flops", ratio), time.perf_counter()
    passes = (ScoreGroups(criterion="l2"), SearchPlan(budget))
    try:
        planned = Pipeline(passes, start=("axes", "groups")).run(program)
    except BudgetInfeasible as error:
        subject.check(bool(error.why and error.cure), f"{ratio}: the error does not say why")
        return row | {"from": round(lowest(program), 4), "why": " ".join(str(error.why).split())}
    sliced = Pipeline((SliceAxes(), FoldIndices()), start=("axes", "groups", "plan")).run(planned)
    row["plan_slice_s"] = round(time.perf_counter() - started, 2)
    got = run_flat(sliced, subject.example)
    at = f"at {ratio}"
    subject.attempt(f"{at}, budget", row, lambda: budget_row(subject, planned, ratio))
    subject.attempt(f"{at}, masking", row, lambda: masking_row(subject, planned, sliced, got, ratio))
    subject.attempt(f"{at}, counting", row, lambda: counting_row(subject, planned, sliced, ratio))
    subject.attempt(f"{at}, saving", row, lambda: saving_row(subject, sliced, got, ratio))
    if onnx and ratio == ONNX_AT:
        subject.attempt(f"{at}, onnx", row, lambda: onnx_row(sliced, threads))
    return row


def lowest(program: Program) -> float:
    """Share of the dense MACs when every group of the default kinds is at its floor."""
    from fxprune.ir.group import DEFAULT_KINDS

    model = CostModel(program)
    floors = {g.axis: g.levels()[0] for g in program.need("groups") if g.prunable and g.kind in DEFAULT_KINDS}
    return model(floors).flops / model().flops


def count_kept(planned: Program) -> dict[Any, int]:
    choices = planned.need("plan").choices
    return {g.axis: len(choices[g.name].keep) for g in planned.need("groups") if g.name in choices}


def budget_row(subject: Subject, planned: Program, ratio: float) -> Row:
    """Never above the budget; within 2 % below it, or nothing more would fit."""
    model, counts = CostModel(planned), count_kept(planned)
    dense, cost = model().flops, model(counts).flops
    subject.check(cost <= ratio * dense, f"{ratio}: cost {cost / dense:.4f} is above the budget")
    if cost < (ratio - 0.02) * dense:
        for group in planned.need("groups"):
            more = [n for n in group.levels() if n > counts.get(group.axis, group.size)]
            fits = bool(more) and model({**counts, group.axis: more[0]}).flops <= ratio * dense
            subject.check(not fits, f"{ratio}: only {cost / dense:.4f} reached, yet {group.name} could keep more")
    return {"reached": round(cost / dense, 4), "macs": cost, "method": planned.need("plan").about["method"]}


def masking_row(subject: Subject, planned: Program, sliced: Program, got: Flat, ratio: float) -> Row:
    """Sliced against masked at two sizes."""
    plan = planned.need("plan")
    masked = masked_run(planned, plan, subject.example)
    error, effect = relative_error(got, masked), relative_error(subject.dense, masked)
    row = {"error": short(error), "effect": short(effect)}
    errors = {"the example's size": error}
    if subject.other is not None:
        other = relative_error(run_flat(sliced, subject.other), masked_run(planned, plan, subject.other))
        errors["another size"] = other
        row["other"] = short(other)
    for where, value in errors.items():
        subject.check(value <= TOLERANCE, f"{ratio}: sliced differs from masked by {value:.1e} at {where}")
    subject.check(effect > 10 * TOLERANCE, f"{ratio}: the plan changed the output by {effect:.1e} only")
    return row


def counting_row(subject: Subject, planned: Program, sliced: Program, ratio: float) -> Row:
    """Predicted MACs against what torch counts while one sample runs (the whole batch where it is fixed)."""
    predicted = CostModel(planned)(count_kept(planned)).flops
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_flat(sliced, subject.single)
    counted = counter.get_total_flops() / 2
    subject.check(
        abs(counted - predicted) <= 1e-6 * predicted,
        f"{ratio}: torch counts {counted / predicted:.6f} of the predicted MACs",
    )
    return {"counted": short(counted / predicted, 9)}


def saving_row(subject: Subject, sliced: Program, got: Flat, ratio: float) -> Row:
    """Written and read back: the same bits, and the file's size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        write_program(sliced.exported, path)
        size, back = path.stat().st_size, Program(read_program(path))
        again = run_flat(back, subject.example)
    same = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(got, again, strict=True))
    subject.check(same, f"{ratio}: outputs change when the program is saved and loaded")
    return {"saved": same, "saved_mb": round(size / 1e6, 1)}


def onnx_row(sliced: Program, threads: int) -> Row:
    """Through ONNX Runtime; ``lower_and_verify`` raises where the outputs differ."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        _, parity = lower_and_verify(OnnxBackend(threads=threads), sliced, Path(folder))
    sizes = [" ".join(f"{k}={v}" for k, v in sizes.items()) for sizes in parity.tried]
    return {"onnx": short(parity.max_rel), "onnx_sizes": sizes, "onnx_s": round(time.perf_counter() - started, 1)}


def short(value: float, digits: int = 3) -> float:
    return value if not math.isfinite(value) else float(f"{value:.{digits}g}")


# ---------------------------------------------------------------- running


def examine(name: str, ratios: Sequence[float], onnx: bool, threads: int) -> Row:
    """The row of one model."""
    torch.set_num_threads(threads)
    row: Row = {"model": name, "failures": []}
    try:
        built = build(name)
    except ModuleNotFoundError as error:
        return row | {"skipped": describe_error(error)}
    try:
        with quiet():
            subject, columns = analyse(name, built)
    except Exception as error:  # a row of the table must tell it, whatever it is
        traceback.print_exc(file=sys.__stderr__)  # past quiet()
        return row | {"failures": [f"analysis: {describe_error(error)}"], "peak_mb": peak_memory() // MIB}
    row |= {**columns, "ratios": []}
    del built
    for ratio in ratios:
        one: Row = {"ratio": ratio}
        subject.attempt(f"at {ratio}", one, lambda: prune(subject, ratio, onnx, threads))  # noqa: B023  called at once
        row["ratios"].append(one)
    return row | {"failures": subject.failures, "peak_mb": peak_memory() // MIB}


def examine_apart(name: str, options: argparse.Namespace) -> Row:
    """The same in a process of its own."""
    argv = [*command("zoo"), "--one", name, "--ratios", options.ratios, "--threads", str(options.threads)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*argv, *(["--no-onnx"] if options.no_onnx else [])],
            capture_output=True,
            text=True,
            timeout=options.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"model": name, "failures": [f"not done after {options.seconds:.0f} s"]}
    try:
        row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"model": name, "failures": [f"exit code {done.returncode}: {describe_error(RuntimeError(last))}"]}
    return row | {"commit": commit(), "seconds": round(time.perf_counter() - started, 1)}


def table(rows: Sequence[Row]) -> Any:
    """One line per model for people; the JSON holds the rest."""
    from rich.table import Table

    bad, skipped = sum(bool(r["failures"]) for r in rows), sum("skipped" in r for r in rows)
    result = Table(
        title=f"{len(rows) - bad - skipped} of {len(rows)} models without a failure, {skipped} skipped", show_lines=True
    )
    ratios = list(dict.fromkeys(one["ratio"] for row in rows for one in row.get("ratios", ())))
    for column in ("model", "nodes", "capture s", "analysis s", "groups", "frozen"):
        result.add_column(column, overflow="fold")
    for ratio in ratios:
        result.add_column(f"{ratio:g}: reached, error, other size", overflow="fold")
    for column in ("MACs", "saved", "onnx", "peak MB", "what failed"):
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*cells(row, ratios))
    return result


def cells(row: Row, ratios: Sequence[float]) -> list[str]:
    done = {one["ratio"]: one for one in row.get("ratios", ())}
    reached = [one for one in done.values() if "reached" in one]
    named = ((reason, count) for reason, count in row.get("frozen", {}).items() if not reason.startswith("other"))
    frozen = sorted(named, key=lambda pair: -pair[1])[:3]
    worst = max((abs(one["counted"] - 1) for one in reached if "counted" in one), default=None)
    onnx = next((f"{one['onnx']:.0e}" for one in reached if "onnx" in one), "")
    return [
        row["model"],
        str(row.get("nodes", "")),
        str(row.get("capture_s", "")),
        str(row.get("analysis_s", "")),
        " ".join(f"{kind} {count}" for kind, count in row.get("groups", {}).items()),
        "; ".join(f"{reason[:50]} ({count})" for reason, count in frozen),
        *(ratio_cell(done.get(ratio, {})) for ratio in ratios),
        "" if worst is None else "exact" if worst < 1e-8 else f"off {worst:.0e}",
        "".join("=" if one.get("saved") else "!" for one in reached),
        onnx,
        str(row.get("peak_mb", "")),
        "; ".join(row["failures"]) or row.get("skipped", ""),
    ]


def ratio_cell(one: Row) -> str:
    if "from" in one:
        return f"from {one['from']:.2f}"
    errors = [f"{one[k]:.0e}" for k in ("error", "other") if k in one]
    return " ".join([f"{one['reached']:.3f}" if "reached" in one else "", *errors]).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="models whose name matches this pattern, in any case")
    parser.add_argument("--ratios", default="0.75,0.5,0.25", help="shares of the dense MACs, comma separated")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX out, to save time")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after every model")
    parser.add_argument("--update", action="store_true", help="rows that --out holds already stay, save those run now")
    parser.add_argument("--seconds", type=float, default=900, help="time limit for each model")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch and ONNX Runtime")
    parser.add_argument("--one", metavar="NAME", help="this model in this process: its row on stdout")
    options = parser.parse_args()
    ratios = [float(r) for r in options.ratios.split(",")]
    if options.one:
        row = examine(options.one, ratios, not options.no_onnx, options.threads)
        print(json.dumps(row))
        return int(bool(row["failures"]))
    from rich.console import Console

    console, rows = Console(stderr=True, width=None if sys.stderr.isatty() else 240), []
    names = [name for name in MODELS if fnmatch.fnmatch(name.lower(), options.only.lower())]
    if not names:
        parser.error(f"no model matches {options.only!r}; known: {', '.join(MODELS)}")
    before = read(options.out)["rows"] if options.update and options.out.exists() else []
    for name in names:
        rows.append(examine_apart(name, options))
        console.print(
            " | ".join(filter(None, [*cells(rows[-1], ratios), f"{rows[-1].get('seconds', '')} s"])),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if options.out:
            every = {row["model"]: row for row in [*before, *rows]}
            write(options.out, "zoo", threads=options.threads, rows=[every[n] for n in MODELS if n in every])
    console.print(table(rows))
    return int(any(row["failures"] for row in rows))
