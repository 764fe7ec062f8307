"""Trajectory importance: what each mode costs, and whether it ranks like brute force.

    python tools/bench/importance.py [--models minilm,deit] [--data ../shared/data] [--out importance.json]
                                     [--sentences 16] [--images 8] [--units 200] [--threads 1]

Models  all-MiniLM-L6-v2 with its real weights (see accuracy.py; sentences of STS-B) and timm's
        deit_tiny_patch16_224 with random weights on random images: its times mean something, its ranks little
Modes   naive: one whole masked forward pass and the loss per unit, timed over a sample spread evenly over groups and
        extrapolated to all heads and neurons; exact: suffix runs of the same sample, extrapolated; probe and hybrid:
        the whole model as a user gets it, all kinds of groups
Figures seconds, how many times faster than naive, forward passes that take as long, Spearman of the whole score with
        naive's on the sample per kind of unit, and the peak memory of the process so far (the modes run in the order
        probe, hybrid, exact, naive)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import tasks
from bench.accuracy.models import DATA
from bench.accuracy.tasks import Missing
from bench.record import peak_memory, write
from fxprune.data import Batch, Calibration
from fxprune.data.metrics import spearman
from fxprune.intake.capture import capture
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.signature import padding_mask
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.consumers import consumers
from fxprune.passes.analysis.importance.distance import output_change
from fxprune.passes.analysis.importance.exact import Removals
from fxprune.passes.analysis.importance.features import find_taps, views
from fxprune.passes.analysis.importance.objective import targets
from fxprune.passes.analysis.importance.terms import balance, combine
from fxprune.passes.analysis.importance.trajectory import Trajectory
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from fxprune.testing import _Masked, run_flat

KINDS = (Kind.HEAD, Kind.FFN)


class Naive:
    """Loss per removal from one whole forward pass each."""

    def __init__(self, program: Program, batch: Batch, criterion: Trajectory) -> None:
        self.program, self.batch, self.measure = program, batch, criterion.measure
        self.taps = find_taps(program)
        self.views = views(consumers(program), self.taps, "later")
        self.mask = padding_mask(program, program.flatten(batch.args, batch.kwargs))
        self.flat = program.flatten(batch.args, batch.kwargs)
        self.dense = self._run({})
        rows = self.dense[0][-1]
        self.entries = self.measure.entries(self.taps[-1], rows)

    def _run(self, keep: Any) -> tuple[list[Tensor], Any]:
        names, seen = {t.value for t in self.taps}, dict[str, Tensor]()

        class Watching(_Masked):
            def run_node(self, n: Any) -> Any:
                value = super().run_node(n)
                if n.name in names:
                    seen[n.name] = value
                return value

        outputs = run_flat(self.program, self.flat, Watching(self.program, keep, self.flat))
        rows = [self.measure.feature(t, seen[t.value], self.mask) for t in self.taps]
        return rows, targets(self.program, outputs, self.batch, self.batch.size)

    @torch.no_grad()
    def loss(self, group: PruneGroup, element: int) -> tuple[float, float]:
        """(features, output) without one element."""
        rows, output = self._run({group.axis: torch.tensor([i for i in range(group.size) if i != element])})
        moved = sum(self.measure.change(self.taps[z], rows[z], self.dense[0][z]) for z in self.views[group.name].wanted)
        return moved * self.entries, float(output_change(output, self.dense[1], self.measure.temperature).mean())


def measure(program: Program, data: Calibration, units: int, seed: int = 0) -> dict[str, Any]:
    """All modes on one program, one batch of data."""
    batch, groups = data.batches[0], [g for g in program.need("groups") if g.prunable and g.kind in KINDS]
    everything = sum(g.size for g in groups)
    generator = torch.Generator().manual_seed(seed)
    heads = [g for g in groups if g.kind is Kind.HEAD]
    share = {g: min(g.size, max(4, units // 4 // len(heads))) for g in heads}
    rest = -(-(units - sum(share.values())) // (len(groups) - len(heads)))
    share = {g: share.get(g, rest) for g in groups}
    chosen = {g: torch.randperm(g.size, generator=generator)[:n].sort().values for g, n in share.items()}
    count = sum(map(len, chosen.values()))
    weight = Trajectory().weight_of(program)
    found: dict[str, Any] = {"units": everything, "sampled": count, "samples": batch.size}
    flat = program.flatten(batch.args, batch.kwargs)
    run_flat(program, flat)
    started = time.perf_counter()
    for _ in range(5):
        run_flat(program, flat)
    forward = (time.perf_counter() - started) / 5
    found["forward_seconds"] = round(forward, 4)
    terms: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for mode in ("probe", "hybrid"):
        criterion = Trajectory(mode=mode)
        started = time.perf_counter()
        features, output = criterion.parts(program, data, seed)
        rows[mode] = {
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak_memory(),
            "notes": list(criterion.notes(program)),
        }
        factor = balance(program, features, output, weight)
        rows[mode]["score"] = {n: s for n, s in combine(features, output, factor).items()}
        print(mode, f"{rows[mode]['seconds']:.1f} s", flush=True)
    removals = Removals(program, [batch], Trajectory().measure, Trajectory().memory * 2**20)
    started = time.perf_counter()
    terms["exact"] = removals("exact", chosen)
    rows["exact"] = {
        "seconds": (time.perf_counter() - started) * everything / count,
        "peak_bytes": peak_memory(),
        "extrapolated": True,
    }
    print("exact", f"{rows['exact']['seconds']:.1f} s, extrapolated", flush=True)
    naive = Naive(program, batch, Trajectory())
    started = time.perf_counter()
    losses = {g.name: torch.tensor([naive.loss(g, int(i)) for i in part]).double() for g, part in chosen.items()}
    rows["naive"] = {
        "seconds": (time.perf_counter() - started) * everything / count,
        "peak_bytes": peak_memory(),
        "extrapolated": True,
    }
    terms["naive"] = ({n: t[:, 0] for n, t in losses.items()}, {n: t[:, 1] for n, t in losses.items()})
    factor = balance(program, *terms["naive"], weight)
    truth = combine(*terms["naive"], factor)
    rows["exact"]["score"] = combine(*terms["exact"], factor)
    rows["exact"]["largest_relative_difference"] = max(
        float(((a[n] - b[n]).abs() / b[n].clamp_min(1e-12)).max())
        for a, b in zip(terms["exact"], terms["naive"], strict=True)
        for n in b
    )
    for mode, row in rows.items():
        score = row.pop("score", truth)
        row["spearman"] = {}
        for kind in KINDS:
            part = {g: i for g, i in chosen.items() if g.kind is kind}
            whole = mode in ("probe", "hybrid")
            one = torch.cat([score[g.name][i] if whole else score[g.name] for g, i in part.items()])
            row["spearman"][str(kind)] = round(spearman(one, torch.cat([truth[g.name] for g in part])), 4)
        row["forwards"] = round(row["seconds"] / forward, 1)
        row["faster_than_naive"] = round(rows["naive"]["seconds"] / row["seconds"], 1)
        row["seconds"] = round(row["seconds"], 2)
        print(
            f"{mode:7} {row['seconds']:9.1f} s {row['forwards']:9.1f} forwards {row['faster_than_naive']:7.1f} x "
            f"{row['spearman']}",
            flush=True,
        )
    return {**found, "modes": rows}


def minilm(folder: Path, sentences: int) -> tuple[Program, Calibration]:
    """The sentence encoder with real weights, and one batch of sentences."""
    task = tasks.minilm(folder, 1)
    return task.program, task.calibration(sentences, 0)


def deit(images: int) -> tuple[Program, Calibration]:
    """Random weights, random images."""
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    import timm

    torch.manual_seed(0)
    module = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    x = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    program = Pipeline((Clean(), Inline(), PropagateAxes(), FindGroups(align=1))).run(capture(module, (x[:2],)))
    return program, Calibration((Batch((x,)),), "random images")


def main(argv: list[str] | None = None) -> int:
    """Run and write JSON; exit code 1 without data or weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,deit")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("build/importance.json"))
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--units", type=int, default=200, help="removals in the sample, at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    for name in args.models.split(","):
        try:
            program, data = minilm(args.data, args.sentences) if name == "minilm" else deit(args.images)
        except (ModuleNotFoundError, Missing) as missing:
            print(f"{name}: {missing}", file=sys.stderr)
            return 1
        print(name, flush=True)
        found[name] = measure(program, data, args.units)
        found[name]["weights"] = "real" if name == "minilm" else "random"
        write(args.out, "importance", threads=args.threads, models=found)
    return 0
